"""What a task gives to training and scoring; backends see NumPy batches and nothing else of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

Batch = dict[str, np.ndarray]
Split = Literal["train", "val", "test", "train+val"]


@dataclass(frozen=True, slots=True)
class Score:
    """Accuracy on a split.

    Attributes
    ----------
    accuracy_pct
        Mean over groups (the tasks of a suite), each the percentage of its examples that are right.
    correct_count, total_count
        Over all examples.
    groups_pct
        Percentage of each group.
    """

    accuracy_pct: float
    correct_count: int
    total_count: int
    groups_pct: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, right: np.ndarray, groups: list[str] | None = None) -> "Score":
        """From one truth value per example, and the name of each example's group."""
        names = np.asarray(groups if groups is not None else ["all"] * len(right))
        found = {str(name): 100.0 * float(right[names == name].mean()) for name in dict.fromkeys(names)}
        mean = float(np.mean(list(found.values()))) if found else float("nan")
        return cls(mean, int(right.sum()), len(right), found if groups is not None else {})


class Task(Protocol):
    """Training examples by number, evaluation batches, and the judgement of what a model returned for them."""

    name: str

    @property
    def kind(self) -> Literal["images", "text"]:
        """What batches hold."""
        ...

    def size(self, split: Split) -> int:
        """Number of examples."""
        ...

    def rows_count(self, split: Split) -> int:
        """Number of rows in all evaluation batches, padding left out."""
        ...

    def labels(self, split: Split) -> np.ndarray:
        """Class of each example, for stratified subsets."""
        ...

    def train_batch(self, split: Split, indices: np.ndarray, rng: np.random.Generator) -> Batch:
        """Examples to learn from; `rng` draws the augmentation."""
        ...

    def eval_batches(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """All examples, in an order that `score` knows; the last batch is padded to keep its shape."""
        ...

    def score(self, split: Split, outputs: np.ndarray) -> Score:
        """Judge the rows a learner returned for `eval_batches`, in order, padding included."""
        ...

    def fingerprint(self) -> str:
        """Digest of the examples: runs on other data of the same name are other runs."""
        ...

    def unreadable(self, split: Split, indices: np.ndarray) -> dict[str, str]:
        """Those of some examples that cannot be read, and why."""
        ...

    def description(self) -> dict[str, Any]:
        """What a result file records about the data."""
        ...
