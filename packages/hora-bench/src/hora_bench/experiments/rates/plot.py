"""Accuracy against the learning rate, and ends of ranges against eigenvalues, from a result alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from scipy import stats

from hora_bench.report.rows import name_of
from hora_bench.report.writing import save
from hora_bench.stats import LEVEL

MARKERS: Final = "os^vDPX*"


def plot(result: dict[str, Any], folder: Path, *, stem: str = "rates") -> list[Path]:
    """Write ``STEM-accuracy.svg`` and ``STEM-eigenvalue.svg`` into `folder`: a panel a task, a colour a choice."""
    figures = {"accuracy": _curves(result), "eigenvalue": _eigenvalues(result)}
    return [save(figure, folder / f"{stem}-{kind}.svg") for kind, figure in figures.items()]


def _curves(result: dict[str, Any]) -> Figure:
    """Means with the interval of seeds; below the curves the range of each choice, an arrow where the grid ends it."""
    tasks, names = result["setting"]["tasks"], list(dict.fromkeys(map(name_of, result["rows"])))
    figure = Figure(figsize=(6.5, 0.6 + 4.2 * len(tasks)), layout="constrained")
    for axis, task in zip(figure.subplots(len(tasks), sharex=True, squeeze=False)[:, 0], tasks, strict=True):
        for row in (row for row in result["rows"] if row["task"] == task):
            index = names.index(name_of(row))
            own = [line for line in result["curves"] if (line["task"], name_of(line)) == (task, name_of(row))]
            x, values = [line["learning_rate"] for line in own], np.array([line["accuracies_pct"] for line in own])
            half = stats.t.ppf((1 + LEVEL) / 2, values.shape[1] - 1) * stats.sem(values, axis=1)
            look: dict[str, Any] = {"color": f"C{index}", "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
            axis.plot(x, values.mean(1), label=name_of(row), **look)
            axis.fill_between(
                x, values.mean(1) - half, values.mean(1) + half, color=f"C{index}", alpha=0.1, linewidth=0
            )
            y = -3 - 3 * index
            axis.plot(
                [row["low_rate"], row["high_rate"]], [y, y], color=f"C{index}", linewidth=4, solid_capstyle="butt"
            )
            for end in row["ends_with_grid"]:
                axis.plot(row[f"{end}_rate"], y, "<" if end == "low" else ">", color=f"C{index}", markersize=9)
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_yticks(range(0, 101, 20))
        axis.set_ylim(-3 * len(names) - 4, 1 + max(max(line["accuracies_pct"]) for line in result["curves"]))
        axis.set_ylabel(f"{task}: validation accuracy, %")
        axis.grid(alpha=0.3, linewidth=0.5)
    axis.set_xlabel(f"learning rate; bars: within {result['setting']['margin']:g} of the best")
    figure.legend(*axis.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=3, loc="outside upper center")
    return figure


def _eigenvalues(result: dict[str, Any]) -> Figure:
    """The registered eigenvalue of every seed and their mean, against the upper end of the range and its interval."""
    tasks, names = result["setting"]["tasks"], list(dict.fromkeys(map(name_of, result["rows"])))
    registered = next(one for one in result["explained"] if one["registered"])
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axis = figure.subplots()
    for row in result["rows"]:
        index, place = names.index(name_of(row)), tasks.index(row["task"])
        own = [one for one in result["eigenvalues"] if (one["task"], name_of(one)) == (row["task"], name_of(row))]
        values = [one[registered["eigenvalue"]] for one in own]
        look: dict[str, Any] = {"color": f"C{index}", "marker": MARKERS[place % len(MARKERS)]}
        axis.scatter(values, [row["high_rate"]] * len(values), s=6, alpha=0.5, **look)
        axis.plot([float(np.mean(values))] * 2, row["high_interval"], color=f"C{index}", linewidth=1)
        label = f"{name_of(row)}, {row['task']}"
        axis.plot(np.mean(values), row["high_rate"], markersize=6, linestyle="", label=label, **look)
    axis.set_xscale("log" if all(one[registered["eigenvalue"]] > 0 for one in result["eigenvalues"]) else "symlog")
    axis.set_yscale("log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1, 2, 5)))
        side.set_major_formatter(StrMethodFormatter("{x:g}"))
        side.set_minor_formatter(NullFormatter())
    axis.set_xlabel("largest eigenvalue of the Hessian at the start, adapter alone; small: seeds")
    axis.set_ylabel("upper end of the range of rates")
    axis.grid(alpha=0.3, linewidth=0.5)
    axis.legend(frameon=False, fontsize=7)
    return figure
