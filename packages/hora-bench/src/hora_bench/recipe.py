"""What is decided before training and the same for every backend: rates, steps and the order of the data."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Schedule = Literal["cosine", "linear"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """AdamW with linear warm-up and decay to zero.

    Attributes
    ----------
    learning_rate, weight_decay
        Of every trained parameter.
    batch_size, steps, warmup_steps
        Examples in a step, optimiser steps, and steps until the full rate.
    schedule
        Of the decay.
    clip_norm
        Norm to which longer gradients are shortened; None leaves them.
    drop_path
        Probability with which branches of the last block are left out for an image; it grows linearly from the first.
    beta1, beta2, eps
        Of Adam.
    """

    learning_rate: float
    weight_decay: float
    batch_size: int
    steps: int
    warmup_steps: int
    schedule: Schedule = "cosine"
    clip_norm: float | None = None
    drop_path: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def steps_of(epochs: float, examples: int, batch_size: int) -> int:
    """Optimiser steps in so many passes over the full training set; a fraction of the data does not shorten them."""
    return max(1, round(epochs * examples / batch_size))


def batch_indices(examples: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Numbers of the examples in one step: shuffled passes laid end to end and cut into batches."""
    first = step * batch_size
    positions = np.arange(first, first + batch_size)
    epochs = positions // examples
    orders = {e: np.random.default_rng([seed, 1, e]).permutation(examples) for e in np.unique(epochs).tolist()}
    return np.array([orders[int(e)][p % examples] for e, p in zip(epochs, positions, strict=True)])


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The random stream of one step's augmentation: a resumed run draws the same."""
    return np.random.default_rng([seed, 2, step])


def kept_paths(depth: int, images: int, drop_path: float, seed: int, step: int) -> np.ndarray:
    """Factors ``(images, depth, 2)`` of the two branches of every block: 0, or 1 over the probability of being kept."""
    kept = 1 - np.linspace(0, drop_path, depth)[:, None]
    drawn = np.random.default_rng([seed, 6, step]).random((images, depth, 2))
    return ((drawn < kept) / kept).astype(np.float32)


def subset(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """A stratified part of the examples, at least one of each class, in their order.

    A smaller fraction of the same seed is part of a larger one.
    """
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = np.random.default_rng([seed, 3]).permutation(len(members))
        chosen.append(members[order[: max(1, round(fraction * len(members)))]])
    return np.sort(np.concatenate(chosen))


def head_init(features: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Kernel ``(features, classes)`` and bias of a new classification head, equal on both backends."""
    kernel = 0.01 * np.random.default_rng([seed, 4]).standard_normal((features, classes))
    return kernel.astype(np.float32), np.zeros(classes, np.float32)
