"""What a task gives to training and scoring; backends see NumPy batches and nothing else of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import numpy as np
from hora_spec import HoraError

Batch = dict[str, np.ndarray]
Split = Literal["train", "val", "test", "train+val"]
Kind = Literal["images", "sentences", "text"]  # classes of images or sentences, or text that a language model writes
PARTS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Judged:
    """One example of the split that was scored.

    Attributes
    ----------
    example
        Path, or number in the split.
    answer, predicted
        What is right, and what the model said; None where it said nothing that could be an answer.
    right
        Whether they agree.
    loss
        Negative log-likelihood of the right answer, in nats.
    group
        Task of a suite that it belongs to.
    """

    example: str
    answer: str
    predicted: str | None
    right: bool
    loss: float
    group: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """Accuracy on a split.

    Attributes
    ----------
    accuracy_pct
        Mean over groups (the tasks of a suite), each the percentage of its examples that are right.
    correct_count, total_count
        Over all examples.
    loss
        Mean over all examples.
    groups_pct
        Percentage of each group.
    """

    accuracy_pct: float
    correct_count: int
    total_count: int
    loss: float
    groups_pct: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, judged: Sequence[Judged]) -> Score:
        """From every judged example."""
        right: dict[str, list[bool]] = {}
        for one in judged:
            right.setdefault(one.group, []).append(one.right)
        groups = {name: 100.0 * float(np.mean(values)) for name, values in right.items()}
        return cls(
            accuracy_pct=float(np.mean(list(groups.values()))),
            correct_count=sum(one.right for one in judged),
            total_count=len(judged),
            loss=float(np.mean([one.loss for one in judged])),
            groups_pct={} if set(groups) <= {""} else groups,
        )


class Task(Protocol):
    """Training examples by number, evaluation batches, and the judgement of what a model returned for them."""

    name: str

    @property
    def kind(self) -> Kind:
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
        """All examples, in an order that `judge` knows; the last batch is padded to keep its shape."""
        ...

    def judge(self, split: Split, outputs: np.ndarray, written: list[str] | None = None) -> list[Judged]:
        """Judge the rows a learner returned for `eval_batches`, in order, padding included.

        `written` are the responses to all records, where answers are generated.
        """
        ...

    def fingerprint(self) -> str:
        """Digest of the bytes of all examples and of their labels: a run on other data is another run."""
        ...

    def unreadable(self, split: Split, indices: np.ndarray) -> dict[str, str]:
        """Those of some examples that cannot be read, and why."""
        ...

    def description(self) -> dict[str, Any]:
        """What a result file records about the data."""
        ...


SHARES: Final = (0.8, 0.1, 0.1)


def split_by_hash(
    digests: Sequence[str], strata: np.ndarray, shares: tuple[float, ...] = SHARES
) -> tuple[np.ndarray, ...]:
    """Numbers of the examples of each part, ascending.

    Parameters
    ----------
    digests
        Of the content of each example. Equal content goes to one part, whatever its label; the order of the examples
        and the names of files change nothing.
    strata
        Class of each example: its contents are shared out as `shares` says, and the first part gets at least one; what
        a small class cannot give to a part, the next class gives.
    shares
        Of the parts; they sum to 1.
    """
    part_of: dict[str, int] = {}
    owed = np.zeros(len(shares) - 1)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        contents = sorted({digests[i] for i in members})
        owed += np.array(shares[1:]) * len(contents)
        others = np.floor(owed + 0.5).astype(int)
        while others.sum() >= len(contents):
            others[others.argmax()] -= 1
        owed -= others
        counts = [len(contents) - int(others.sum()), *others.tolist()]
        parts = np.repeat(np.arange(len(shares)), counts)
        for content, part in zip(contents, parts.tolist(), strict=False):
            part_of.setdefault(content, part)
    parts = np.array([part_of[content] for content in digests])
    return tuple(np.flatnonzero(parts == part) for part in range(len(shares)))


def balanced(strata: np.ndarray, limit: int) -> np.ndarray:
    """Numbers of at most `limit` examples, as equally many of each class as there are; ascending.

    Raises
    ------
    HoraError
        The limit leaves a class without any.
    """
    classes = np.unique(strata)
    if limit < min(len(classes), len(strata)):
        raise HoraError(f"--limit leaves at least one example of each of {len(classes)} classes, got {limit}: raise it")
    orders = [np.random.default_rng([0, 5]).permutation(np.flatnonzero(strata == name)) for name in classes]
    turns = [order[turn] for turn in range(max(map(len, orders))) for order in orders if turn < len(order)]
    return np.sort(turns[:limit])
