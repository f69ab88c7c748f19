"""A comparison whose tasks are pieces, each a file of its own, read as one: a line a choice, a column a task."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Final

from hora_bench.report.comparisons import parameters, shown
from hora_bench.report.rows import COMPARISONS, Row, is_lora, name_of, paired, proxy_of, rows_of, typical
from hora_bench.report.writing import link, table
from hora_bench.stats import MARGIN, Difference

Records = Sequence[tuple[Path, dict[str, Any]]]
TASK: Final = re.compile(r" --task \S+")
FILE: Final = re.compile(r"experiments/(\S+)\.toml")
MEDIANS: Final = "Medians of the paired differences in points, which a few seeds that collapse do not move."
FEWEST_TASKS: Final = 3  # that have a mean
CONTROLLED: Final = ("joint", "random-fixed-a")
OVER_TASKS: Final = (
    "Differences from LoRA in points, the word for each, and in brackets what could have been seen. The mean of tasks "
    "takes the tasks as the sample (Student's t over their differences), and few tasks tell little; what a race "
    "stopped early is larger than the truth."
)


def pieces_of(records: Records, *, proxy: bool) -> dict[str, list[tuple[Path, dict[str, Any]]]]:
    """Files of tuned comparisons by the command that makes them, whatever task it was given.

    Parameters
    ----------
    records
        Result files and their content.
    proxy
        Those of screens; or those of whole models that were made a task at a time.
    """
    found: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path, content in records:
        result = content["result"]
        if content["experiment"] not in COMPARISONS or not result.get("search") or proxy_of(result) != proxy:
            continue
        command, tasks = TASK.subn("", content["command"])
        if proxy or tasks:
            found.setdefault(command, []).append((path, content))
    return found


def section(command: str, pieces: Records, page: Path) -> list[str]:
    """Accuracy and test loss of every choice over LoRA on every task, and over the tasks.

    Parameters
    ----------
    command, pieces
        As `pieces_of` has them.
    page
        Where the text will stand, for the links.
    """
    named = FILE.search(command)
    on: dict[str, dict[str, Row]] = {}  # data to choice to row
    where: dict[str, Path] = {}
    margin = MARGIN
    for path, content in pieces:
        margin = content["result"]["setting"].get("margin_pct", MARGIN)
        for row in rows_of(content["result"]):
            on.setdefault(data := _data(row), {})[name_of(row)] = row
            where[data] = path
    names = [name for name in dict.fromkeys(chain.from_iterable(on.values())) if not _reference(name, on)]
    loras = [next((row for row in rows.values() if is_lora(row)), None) for rows in on.values()]
    lines = [f"### {named.group(1) if named else command}", "", f"`{command}`", ""]
    header = ("choice", "parameters", *(f"{data}: {link(where[data], page)}" for data in on), "mean of tasks")
    accuracies = ("" if one is None else f"{one['mean_pct']}" for one in loras)
    rows: list[tuple[str, ...]] = [("LoRA, %", "", *accuracies, "")]
    rows += [_line(name, [rows.get(name) for rows in on.values()], margin) for name in names]
    if all(name in names for name in CONTROLLED):
        rows.append(_controlled([[rows.get(name) for name in CONTROLLED] for rows in on.values()], margin))
    lines += [*table(header, rows), "Test loss less LoRA's: lower is better."]
    losses = [_loss_line(name, [rows.get(name) for rows in on.values()]) for name in names]
    lines += table(("choice", *on, "mean of tasks"), losses)
    medians = [_typical_line(name, [rows.get(name) for rows in on.values()], loras) for name in names]
    return [*lines, MEDIANS, *table(("choice", *on), medians)]


def never_worse(pieces: Records) -> list[str]:
    """Choices that are better on some task, and worse on none."""
    words: dict[str, set[str]] = {}
    for _, content in pieces:
        for row in rows_of(content["result"]):
            words.setdefault(name_of(row), set()).add(row["word"])
    return [name for name, found in words.items() if "better" in found and "worse" not in found]


def _reference(name: str, on: dict[str, dict[str, Row]]) -> bool:
    return any(is_lora(rows[name]) for rows in on.values() if name in rows)


def _data(row: Row) -> str:
    return f"{100 * row['fraction']:g} % of {row['task']}"


def _line(name: str, rows: Sequence[Row | None], margin: float) -> tuple[str, ...]:
    """Of a choice, with the sizes that tasks give it."""
    counts = sorted({int(parameters(row).replace(",", "")) for row in rows if row is not None and parameters(row)})
    sizes = " to ".join(f"{count:,}" for count in dict.fromkeys([*counts[:1], *counts[-1:]]))
    cells = ["" if row is None else _judged(row["over_lora"], row["word"]) for row in rows]
    return (name, sizes, *cells, _mean([row["over_lora"].mean for row in rows if row is not None], margin))


def _controlled(pairs: Sequence[Sequence[Row | None]], margin: float) -> tuple[str, ...]:
    found = [None if joint is None or random is None else paired(joint, random) for joint, random in pairs]
    cells = ["" if one is None else _judged(one, one.word(margin)) for one in found]
    return ("joint over a random A", "", *cells, _mean([one.mean for one in found if one is not None], margin))


def _judged(difference: Difference, word: str) -> str:
    seen = "" if difference.detectable is None else f" ({difference.detectable})"
    return f"{shown(difference)}, {word}{seen}"


def _mean(means: Sequence[float], margin: float) -> str:
    """Over tasks, and the word for it; nothing of fewer than three."""
    if len(means) < FEWEST_TASKS:
        return ""
    found = Difference.of(means, [0.0] * len(means))
    return f"{shown(found)}, {found.word(margin)}"


def _loss_line(name: str, rows: Sequence[Row | None]) -> tuple[str, ...]:
    losses = [row and row.get("loss_over_lora") for row in rows]
    means = [loss["mean"] for loss in losses if loss]
    mean = shown(Difference.of(means, [0.0] * len(means))) if len(means) >= FEWEST_TASKS else ""
    return (name, *(_loss(one) if one else "" for one in losses), mean)


def _typical_line(name: str, rows: Sequence[Row | None], loras: Sequence[Row | None]) -> tuple[str, ...]:
    both = zip(rows, loras, strict=True)
    return (name, *("" if row is None or lora is None else typical(row, lora) for row, lora in both))


def _loss(one: dict[str, float]) -> str:
    return f"{one['mean']:+.2f} ({one['low']:+.2f} to {one['high']:+.2f})"
