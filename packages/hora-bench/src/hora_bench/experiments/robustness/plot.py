"""What is kept under each corruption and attack, over LoRA's, from a result alone: a small plot for each choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from hora_bench.report.rows import name_of
from hora_bench.report.writing import save

WIDE: Final = 2  # plots beside each other, so that a phone shows them
MEAN: Final = "mean of"


def plot(result: dict[str, Any], folder: Path, *, stem: str = "robustness") -> list[Path]:
    """Write ``STEM.svg`` into `folder`, or ``STEM-TASK.svg`` where there are several tasks."""
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    paths = []
    for task in tasks:
        rows = [row for row in result["rows"] if row["task"] == task and row.get("kept_over_lora_pct")]
        name = stem if len(tasks) == 1 else f"{stem}-{task.replace('_', '-')}"
        paths += [save(_multiples(rows), folder / f"{name}.svg")] if rows else []
    return paths


def _multiples(rows: list[dict[str, Any]]) -> Figure:
    """Conditions below each other, means filled; all plots have one scale."""
    names = list(dict.fromkeys(name_of(row) for row in rows))
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    down = -(-len(names) // WIDE)
    size = (3.6 * min(WIDE, len(names)) + 0.6, (0.6 + 0.2 * len(conditions)) * down + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(down, min(WIDE, len(names)), sharex=True, sharey=True, squeeze=False).ravel()
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes, names, strict=False):
        axis.tick_params(labelsize=8)
        axis.axvline(0, color="0.6", linewidth=0.8)
        axis.set_title(name, fontsize=9)
        for row in (row for row in rows if name_of(row) == name):
            over, mean = row["kept_over_lora_pct"], row["condition"].startswith(MEAN)
            bounds = (over["low_pct"], over["high_pct"])
            widths = None if None in bounds else [[over["mean_pct"] - bounds[0]], [bounds[1] - over["mean_pct"]]]
            axis.errorbar(
                over["mean_pct"], conditions.index(row["condition"]), xerr=widths, fmt="o", capsize=2,
                color="C1" if mean else "C0", markersize=5 if mean else 3.5, fillstyle="full" if mean else "none",
            )  # fmt: skip
    for axis in axes[max(0, len(names) - WIDE) : len(names)]:
        axis.tick_params(labelbottom=True)
    axes[0].set_yticks(range(len(conditions)), conditions)
    axes[0].set_ylim(len(conditions) - 0.4, -0.6)
    figure.supxlabel("kept of accuracy above chance, over LoRA's, %", fontsize=9)
    return figure
