"""Time and memory of every method on both backends, side by side in one process."""
