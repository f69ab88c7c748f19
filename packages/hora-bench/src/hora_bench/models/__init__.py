"""Models of the benchmark: small NNX networks that carry timm's and Hugging Face's names, and their checkpoints."""
