"""Trainable parameters and multiply-accumulates of every method on real architectures, without weights."""

from .run import cost, paper

__all__ = ["cost", "paper"]
