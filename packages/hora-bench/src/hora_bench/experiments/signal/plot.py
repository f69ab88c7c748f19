"""What heads have in common in the gradient, from a result alone: as similarity, and as what they read and write."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from hora_bench.report.writing import save

SIMILARITIES: Final = {"similarity": "coordinate by coordinate", "similarity_in_frame": "in a common frame"}
HELD: Final = {
    "inputs_one": "inputs, one basis for all heads",
    "inputs_own": "inputs, a basis for each head",
    "inputs_together": "inputs, one basis for Q and V",
    "outputs_one": "outputs, one basis for all heads",
    "outputs_own": "outputs, a basis for each head",
}


def plot(result: dict[str, Any], folder: Path, *, stem: str = "signal") -> list[Path]:
    """Write ``STEM-similarity.svg`` and ``STEM-held.svg`` into `folder`; what chance gives is a grey bar."""
    rank = result["setting"]["rank"]
    axes = {
        "similarity": (SIMILARITIES, (-0.4, 1.05), "similarity of two heads' signals; grey: by chance"),
        "held": (HELD, (-0.1, 1.2), f"part of the signal held by {rank} directions; grey: random ones"),
    }
    return [save(_points(result["summary"], *how), folder / f"{stem}-{kind}.svg") for kind, how in axes.items()]


def _points(summary: list[dict[str, Any]], names: dict[str, str], limits: tuple[float, float], label: str) -> Figure:
    """A measure of a projection a line, states in colours, tasks and seeds as points; intervals may leave the plot."""
    lines = [(name, p) for name in names for p in dict.fromkeys(one["projection"] for one in summary)]
    states = list(dict.fromkeys(one["state"] for one in summary))
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(lines)), layout="constrained")
    axis = figure.subplots()
    for line, (name, p) in enumerate(lines):
        for index, state in enumerate(states):
            own = [one for one in summary if (one["measure"], one["projection"], one["state"]) == (name, p, state)]
            for turn, one in enumerate(own):
                y = line + 0.6 * ((index + (turn + 1) / (len(own) + 1)) / len(states) - 0.5)
                low, high = one["by_chance"]
                axis.plot([low, high], [y, y], "o-", color="0.75", linewidth=6, markersize=6)
                bounds = [[one["mean"] - one["low"]], [one["high"] - one["mean"]]]
                axis.errorbar(
                    one["mean"], y, xerr=bounds, fmt="o", color=f"C{index}", markersize=4, capsize=2,
                    label=state if (line, turn) == (0, 0) else None,
                )  # fmt: skip
    axis.axvline(0, color="0.6", linewidth=0.8)
    axis.set_yticks(range(len(lines)), [f"{p.upper()}, {names[name]}" for name, p in lines], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(label)
    axis.set_xlim(*limits)
    axis.legend(frameon=False, fontsize=8)
    return figure
