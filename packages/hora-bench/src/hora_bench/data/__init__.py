"""Tasks: data, splits, protocol and scoring, the same for both backends."""
