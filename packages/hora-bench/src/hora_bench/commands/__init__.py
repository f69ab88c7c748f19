"""Commands of ``hora-bench`` that are not experiments."""
