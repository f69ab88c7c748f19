"""Robustness: what is kept under corruptions and adversarial steps, beside LoRA."""
