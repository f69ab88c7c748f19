"""Which examples train, validate and test where nobody has said so: decided by content, alike in every class."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from hora_spec import HoraError

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
