"""Comparisons as tables and plots: a choice a line, accuracies, and paired differences from LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure

from hora_bench.experiments.rates.widths import range_of
from hora_bench.report.rows import Row, is_lora, name_of, proxy_of, rows_of
from hora_bench.report.writing import cell, save
from hora_bench.stats import MARGIN, Difference

FEWEST_RATES: Final = 5
SIZES: Final = 3  # of a method, to draw a curve over them

HEADER = (
    "choice",
    "data",
    "rate",
    "accuracy, %",
    "over LoRA, points",
    "of other examples",
    "could have seen",
    "verdict",
    "test loss",
    "loss over LoRA",
    "seeds",
    "parameters",
    "labels",
)


def shown(difference: Difference | None) -> str:
    """A difference with its interval."""
    if difference is None:
        return ""
    if difference.low is None:
        return f"{difference.mean:+}"
    return f"{difference.mean:+} ({difference.low:+} to {difference.high:+})"


def parameters(row: Row) -> str:
    """How many are trained; nothing where every run diverged."""
    return "" if (count := row.get("params_count")) is None else f"{count:,}"


def cells_of(row: Row) -> tuple[str, ...]:
    """A line of the table."""
    over = row["over_lora"]
    interval = f" ({row['low_pct']} to {row['high_pct']})" if "low_pct" in row else ""
    edge = f" ({row['rate_at_edge']} tried)" if row["rate_at_edge"] else ""
    return (
        name_of(row),
        _data_of(row),
        f"{row.get('learning_rate', ''):g}{edge}" if "learning_rate" in row else "",
        f"{row['mean_pct']}{interval}",
        shown(over),
        "{:+} to {:+}".format(*others) if (others := row.get("over_lora_pct", {}).get("of_other_examples_pct")) else "",
        "" if over is None or over.detectable is None else f"{over.detectable}",
        row["word"],
        cell(row.get("test_loss")),
        cell(row.get("loss_over_lora")),
        str(row["seeds"]),
        parameters(row),
        cell(row.get("labels_count")),
    )


def _data_of(row: Row) -> str:
    return f"{100 * row['fraction']:g} % of {row['task']}"


def _labels(rows: Sequence[Row]) -> list[str]:
    """Names of choices in a plot, with their task where there are several."""
    several = len({row["task"] for row in rows}) > 1
    return [f"{name_of(row)}, {row['task']}" if several else name_of(row) for row in rows]


def lines_of(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells, without columns that are empty."""
    rows = [cells_of(row) for row in rows_of(result)]
    kept = [i for i in range(len(HEADER)) if any(row[i] for row in rows)]
    return tuple(HEADER[i] for i in kept), [tuple(row[i] for i in kept) for row in rows]


def widths_of(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of every choice the best rate and the range of rates whose accuracy in the search is within the margin of it.

    As `hora_bench.experiments.rates.widths` has it; accuracy is 0 where a seed diverged. Nothing is said of fewer than
    five rates, and an end of the range that is an end of the grid is marked.
    """
    lines, margin = [], result["setting"].get("margin_pct", MARGIN)
    for row in rows_of(result):
        found = _curve(row, result.get("search", []))
        if len(found) < FEWEST_RATES:
            continue
        rates, accuracies = sorted(found), np.array([found[rate] for rate in sorted(found)]).T
        good = range_of(accuracies, rates, margin=margin, fall=margin)
        lines.append(
            (
                name_of(row),
                _data_of(row),
                f"{rates[int(accuracies.mean(0).argmax())]:.3g}",
                f"{'at most ' * good.open_low}{2**good.low:.2g}",
                f"{'at least ' * good.open_high}{2**good.high:.2g}",
                f"{'at least ' * (good.open_low or good.open_high)}{2**good.width:.1f}",
            )
        )
    return lines


def _curve(row: Row, search: Sequence[dict[str, Any]]) -> dict[float, list[float]]:
    """Accuracies of all seeds at every rate that a row's search tried."""
    found: dict[float, list[float]] = {}
    for trial in search:
        if all(trial.get(key) == row.get(key) for key in ("task", "factor", "value", "fraction")):
            found.setdefault(trial["learning_rate"], []).append(trial["accuracy_pct"] or 0.0)
    return found


def plot(result: dict[str, Any], folder: Path, *, stem: str) -> list[Path]:
    """Write ``STEM.svg``: a curve over fractions of the data or over parameters, or else a choice per line."""
    rows = rows_of(result)
    sized = {name: own for name, own in _by_method(rows).items() if len({row["params_count"] for row in own}) >= SIZES}
    several = len({row["fraction"] for row in rows}) > 1
    figure = _curves(rows) if several else _by_parameters(sized) if len(sized) > 1 else _forest(rows)
    return [save(figure, folder / f"{stem}.svg")]


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that were trained, by their method."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if "method" in row and row["params_count"] is not None:
            found.setdefault(row["method"], []).append(row)
    return found


def _by_parameters(sized: Mapping[str, Sequence[Row]]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for index, (name, rows) in enumerate(sized.items()):
        own = sorted(rows, key=lambda row: row["params_count"])
        x = [row["params_count"] * (1 + 0.02 * index) for row in own]
        axis.plot(x, [row["mean_pct"] for row in own], color=f"C{index}", marker="o", markersize=4, label=name)
        for place, row in zip(x, own, strict=True):
            axis.scatter([place] * row["seeds"], row["accuracies_pct"], s=6, color=f"C{index}", alpha=0.5)
    axis.set_xscale("log")
    axis.set_xlabel("trained parameters, the new head's among them; small dots are seeds")
    axis.set_ylabel("test accuracy, %")
    axis.legend(frameon=False)
    return figure


def _curves(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    names = _labels(rows)
    for index, name in enumerate(dict.fromkeys(names)):
        own = [row for row, label in zip(rows, names, strict=True) if label == name]
        x = [100 * row["fraction"] * (1 + 0.03 * index) for row in own]
        axis.plot(x, [row["mean_pct"] for row in own], color=f"C{index}", marker="o", markersize=4, label=name)
        for place, row in zip(x, own, strict=True):
            accuracies = row.get("accuracies_pct", [])
            axis.scatter([place] * len(accuracies), accuracies, s=6, color=f"C{index}", alpha=0.5)
    axis.set_xscale("log")
    axis.set_xlabel("training data, %; small dots are seeds")
    axis.set_ylabel("test accuracy, %")
    axis.legend(frameon=False)
    return figure


def _forest(rows: Sequence[Row]) -> Figure:
    paired = any(row["over_lora"] is not None and row["over_lora"].low is not None for row in rows)
    figure = Figure(figsize=(4.5 * (1 + paired), 1 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 1 + paired, squeeze=False, sharey=True)[0]
    axes[0].set_yticks(range(len(rows)), _labels(rows), fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("accuracy, %")
    for line, row in enumerate(rows):
        if "low_pct" in row:
            _bar(axes[0], line, row["mean_pct"], row["low_pct"], row["high_pct"])
        else:
            axes[0].plot(row["mean_pct"], line, "o", color="C0", markersize=4)
            axes[0].scatter(row["accuracies_pct"], [line] * row["seeds"], s=6, color="C0", alpha=0.5)
        if paired and (over := row["over_lora"]) is not None and over.low is not None:
            _bar(axes[1], line, over.mean, over.low, over.high)
    if paired:
        axes[1].axvline(0, color="0.6", linewidth=0.8)
        axes[1].set_xlabel("difference from LoRA, points")
    return figure


def _bar(axis: Any, line: int, mean: float, low: float, high: float) -> None:
    axis.errorbar([mean], [line], xerr=[[mean - low], [high - mean]], fmt="o", color="C0", markersize=4, capsize=2)


def forest(differences: Sequence[tuple[str, Difference]]) -> Figure:
    """Paired differences of many comparisons below each other: those whose whole interval is right of 0 are ahead."""
    figure = Figure(figsize=(6, 1 + 0.32 * len(differences)), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color="0.6", linewidth=0.8)
    for line, (_, one) in enumerate(differences):
        if one.low is None or one.high is None:
            axis.plot(one.mean, line, "o", color="0.5", markersize=4)
        else:
            _bar(axis, line, one.mean, one.low, one.high)
    axis.set_yticks(range(len(differences)), [name for name, _ in differences], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("difference from LoRA, points; grey: one seed, no interval")
    return figure


def found_in(result: dict[str, Any]) -> Iterator[tuple[str, Difference]]:
    """Every comparison of whole models with LoRA in which each had a rate of its own."""
    if proxy_of(result):
        return
    for row in rows_of(result):
        if result.get("search") and row["over_lora"] is not None and not is_lora(row):
            yield f"{name_of(row)}, {_data_of(row)}", row["over_lora"]


def control_lines(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Cells of the table of controls."""
    for one in records:
        numbers = (f"{one[key]}" for key in ("accuracy_pct", "shuffled_pct", "chance_bound_pct"))
        yield (one["backend"], one["method"], *numbers, "yes" if one["at_chance"] else "no")
