"""Log-log plot of the rates, from a result alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from hora_bench.report.writing import save

PANELS: Final = (
    ("d2", "Voronoi loss D2"),
    ("value_error", "error of the value update"),
    ("prediction_error", "prediction error"),
)
STYLES: Final = {
    "full": ("C0", "o", "shared (HoRA)"),
    "none": ("C3", "s", "not shared (LoRA)"),
    "a": ("C1", "^", "A shared"),
    "b": ("C2", "v", "B shared"),
}
ROWS: Final = {2: "one head fitted with two", 1: "control: one head fitted with one"}


def plot(result: dict[str, Any], folder: Path, *, stem: str = "theory") -> list[Path]:
    """Write ``STEM.svg``: mean (line, 95 % bootstrap band) and median (dotted) of each loss by sample size."""
    sizes = result["setting"]["sizes"]
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(len(ROWS), len(PANELS), sharex=True)
    for row, (heads, row_title) in zip(axes, ROWS.items(), strict=True):
        for axis, (loss, title) in zip(row, PANELS, strict=True):
            for record in result["curves"]:
                if (record["fitted_heads"], record["loss"]) != (heads, loss):
                    continue
                colour, marker, label = STYLES[record["sharing"]]
                mean, median = record["mean"], record["median"]
                label = f"{label}: n^{mean['slope']:.2f}"
                axis.loglog(sizes, mean["value"], color=colour, marker=marker, markersize=4, label=label)
                axis.loglog(sizes, median["value"], color=colour, linestyle=":", linewidth=1)
                axis.fill_between(sizes, *zip(*mean["interval"], strict=True), color=colour, alpha=0.15, linewidth=0)
            axis.set_title(f"{title}, {row_title}", fontsize=8)
            axis.legend(fontsize=7, frameon=False)
            axis.grid(alpha=0.3, linewidth=0.5)
    for axis in axes[-1]:
        axis.set_xlabel("samples")
    return [save(figure, folder / f"{stem}.svg")]
