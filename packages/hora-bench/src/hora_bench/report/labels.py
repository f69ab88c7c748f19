"""Wrong labels at equal clean accuracy: what each choice keeps of what it is above chance with right ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from hora_bench.report.comparisons import shown
from hora_bench.report.rows import COMPARISONS, Row, is_lora, name_of, of_wrong_labels, proxy_of, rows_of
from hora_bench.report.writing import folded
from hora_bench.stats import Difference, kept

Records = Sequence[tuple[Path, dict[str, Any]]]
WRONG: Final = "-wrong"
TITLE: Final = "Wrong labels at equal clean accuracy"
LEAD: Final = (
    "The share that is kept of accuracy above chance, by the same seeds with right labels (a screen of the same "
    "choices) and with wrong ones, each at a rate of its own. Looked at after the runs: described, and not judged."
)
HEADER: Final = ("task", "choice", "clean, %", "with wrong labels, %", "kept above chance, %", "kept over LoRA, %")


def section(records: Records) -> list[str]:
    """Lines of the page; none where no task was screened with right labels, with wrong ones, and for robustness.

    Parameters
    ----------
    records
        Result files of experiments and their content; what guessing has is in those of robustness.
    """
    rows = [*_rows(records)]
    return [f"## {TITLE}", "", LEAD, "", *folded("what is kept where labels are wrong", HEADER, rows)] if rows else []


def _rows(records: Records) -> Iterator[tuple[str, ...]]:
    chances = {
        one["task"]: one["chance_pct"]
        for _, content in records
        if content["experiment"] == "robustness"
        for one in content["result"]["answers"]
        if one["answer"] == "corruptions"
    }
    compared = [content["result"] for _, content in records if content["experiment"] in COMPARISONS]
    for result in compared:
        if not of_wrong_labels(result):
            continue
        wrong = rows_of(result)
        base = wrong[0]["task"].partition(WRONG)[0]
        clean = max((_clean(other, base, result) for other in compared), key=len)
        if base in chances and clean:
            yield from _kept(wrong, clean, chances[base])


def _clean(result: dict[str, Any], task: str, like: dict[str, Any]) -> dict[str, Row]:
    """Choices of `like` with the same seeds, as far as this result has them with right labels, LoRA among them."""
    own, other = result["setting"], like["setting"]
    alike = all(own.get(key) == other.get(key) for key in ("fraction", "last_blocks", "seeds", "steps"))
    if not alike or proxy_of(result) != proxy_of(like):
        return {}
    names = {name_of(row) for row in rows_of(like)}
    found = {name_of(row): row for row in rows_of(result) if row["task"] == task and name_of(row) in names}
    return found if any(map(is_lora, found.values())) else {}


def _kept(wrong: Sequence[Row], clean: dict[str, Row], chance_pct: float) -> Iterator[tuple[str, ...]]:
    lora = next(row for row in wrong if is_lora(row))
    for row in wrong:
        name = name_of(row)
        if name not in clean:
            continue
        seeds = min(len(one["accuracies_pct"]) for one in (row, lora, clean[name], clean[name_of(lora)]))
        own, theirs = (_share(one, clean[name_of(one)], seeds, chance_pct) for one in (row, lora))
        over = None if own is None or theirs is None or row is lora else Difference.of(list(own), list(theirs))
        means = [f"{np.mean(one['accuracies_pct'][:seeds]):.2f}" for one in (clean[name], row)]
        share = "" if own is None else f"{own.mean():.2f}"
        yield (f"{100 * row['fraction']:g} % of {row['task']}", name, *means, share, shown(over))


def _share(row: Row, clean: Row, seeds: int, chance_pct: float) -> np.ndarray | None:
    accuracies, base = (np.array(one["accuracies_pct"][:seeds]) for one in (row, clean))
    return kept(accuracies, base, chance_pct)
