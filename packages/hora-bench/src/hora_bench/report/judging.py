"""How numbers lead to the words of a verdict, and what is said beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from hora_bench.report.comparisons import shown
from hora_bench.report.rows import Row, name_of
from hora_bench.stats import Difference, Word

Said = Iterator[tuple[str, str]]
CONFIRMED: Final = "confirmed"
ABSENT: Final = "not seen"
UNRESOLVED: Final = "not resolved"
UNTESTED: Final = "not measured"
WORDS: Final[tuple[Word, ...]] = ("better", "equal", "not resolved", "worse")


def of_difference(difference: Difference, claimed: float = 0.0) -> str:
    """Confirmed where all of the interval is at least half of what is claimed; not seen where none of it is."""
    if difference.low is None or difference.high is None:
        return UNRESOLVED
    least = max(claimed / 2, 1e-9)
    return CONFIRMED if difference.low >= least else ABSENT if difference.high < least else UNRESOLVED


def points(difference: Difference) -> str:
    """A difference with its interval, its seeds, and what could have been seen."""
    seen = "" if difference.detectable is None else f", of which {difference.detectable} could have been seen"
    return f"{shown(difference)} points over {difference.seeds} paired seeds{seen}"


def edge_said(*rows: Row | None) -> str:
    """What is to be said of best rates that are the last of their grid."""
    found = [f"{name_of(row)}'s rate is the {row['rate_at_edge']} tried" for row in rows if row and row["rate_at_edge"]]
    return f"; {' and '.join(found)}, a better may lie beyond" if found else ""


def unless(edge: str, word: str) -> str:
    """A comparison with a rate at the edge of its grid decides nothing."""
    return UNRESOLVED if edge else word


def others(judged: Sequence[Row], first: Row) -> str:
    """How many of the choices beside the first have each word, and which of them differ from LoRA."""
    named = {word: [name_of(one) for one in judged if one is not first and one["word"] == word] for word in WORDS}
    counts = [
        f"{len(names)} {word}" + (f" ({', '.join(names)})" if word in ("better", "worse") else "")
        for word, names in named.items()
        if names
    ]
    plural = "s" * (len(judged) != 2)
    return f". Of {len(judged) - 1} other choice{plural}: {', '.join(counts)}" if counts else ""
