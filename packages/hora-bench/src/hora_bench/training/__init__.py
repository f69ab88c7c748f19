"""One training loop for both backends: the same recipe, data order, schedule and checkpoints."""
