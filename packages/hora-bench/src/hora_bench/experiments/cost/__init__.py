"""Trainable parameters and multiply-accumulates of every method on real architectures, without weights."""
