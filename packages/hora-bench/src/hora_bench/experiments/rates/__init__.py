"""How wide the range of good learning rates is, and whether the curvature at the start explains it."""
