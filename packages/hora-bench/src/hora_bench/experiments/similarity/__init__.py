"""How alike the heads' updates are, and how many directions an update uses: HoRA against LoRA and multi-head LoRA."""
