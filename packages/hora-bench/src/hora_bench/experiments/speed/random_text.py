"""Sequences to time language models on: what they say does not change how long a step takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from hora_bench.data.base import Batch, Split

NAME: Final = "random-text"
TOKENS: Final = 10  # every vocabulary has so many
RESPONSE: Final = 4


@dataclass(frozen=True, slots=True)
class RandomText:
    """Random tokens, the last of which are the response that the loss is on.

    Attributes
    ----------
    seq
        Length of every sequence.
    """

    seq: int
    name: str = NAME
    kind: Literal["text"] = "text"

    def train_batch(self, split: Split, indices: np.ndarray, rng: np.random.Generator) -> Batch:
        """``tokens (batch, seq)``; ``at``, ``label`` and ``weight (batch, response)``, as a `TextTask` gives them."""
        tokens = rng.integers(TOKENS, size=(len(indices), self.seq), dtype=np.int32)
        label = tokens[:, -RESPONSE:]
        at = np.broadcast_to(np.arange(self.seq - RESPONSE, self.seq, dtype=np.int32) - 1, label.shape)
        return {"tokens": tokens, "at": at.copy(), "label": label.copy(), "weight": np.ones(label.shape, np.float32)}
