"""HoRA as a PEFT method for PyTorch: hypernetwork-shared low-rank adaptation of attention heads."""
