"""Heat maps, distributions and spectra, from a result alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hora_bench.experiments.similarity.measures import off_diagonal
from hora_bench.report.writing import save


def plot(result: dict[str, Any], folder: Path, *, stem: str = "similarity") -> list[Path]:
    """Write ``STEM-heatmaps.svg`` and ``STEM-distributions.svg`` into `folder`.

    Parameters
    ----------
    result
        What `similarity` returned.
    folder, stem
        Existing directory, and how names begin.

    Returns
    -------
    list of Path
        The files.
    """
    figures = {"heatmaps": heatmaps(result), "distributions": distributions(result)}
    return [save(figure, folder / f"{stem}-{kind}.svg") for kind, figure in figures.items()]


def heatmaps(result: dict[str, Any]) -> Figure:
    """Cosines between the heads' updates: a method per row; first, middle and last layer of Q and of V."""
    records, methods, projections, layers = _indexed(result)
    shown = [(p, layer) for p in projections for layer in (layers[0], layers[len(layers) // 2], layers[-1])]
    figure = Figure(figsize=(1.5 * len(shown), 1.5 * len(methods)), layout="constrained")
    axes = figure.subplots(len(methods), len(shown), squeeze=False)
    for row, method in zip(axes, methods, strict=True):
        for axis, (p, layer) in zip(row, shown, strict=True):
            image = axis.imshow(records[method, p, layer]["cosines_delta"], vmin=-1, vmax=1, cmap="RdBu_r")
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{p}, layer {layer}", fontsize=7)
        row[0].set_ylabel(method, fontsize=7)
    figure.colorbar(image, ax=axes, shrink=0.6, label="cosine similarity of two heads' updates")
    return figure


def distributions(result: dict[str, Any]) -> Figure:
    """All cosines between different heads, and the participation ratio by layer, of every method."""
    records, methods, projections, layers = _indexed(result)
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    for column, p in zip(axes.T, projections, strict=True):
        for index, method in enumerate(methods):
            own = [records[method, p, layer] for layer in layers]
            cosines = np.concatenate([off_diagonal(np.array(record["cosines_delta"])) for record in own])
            column[0].hist(cosines, np.linspace(-1, 1, 41), histtype="step", color=f"C{index}", label=method)
            column[1].plot(layers, [one["participation_ratio"] for one in own], color=f"C{index}", marker=".")
        column[0].set_xlabel(f"cosine between heads, {p}")
        column[1].set_xlabel(f"layer, {p}")
    axes[0, 0].set_ylabel("pairs of heads")
    axes[1, 0].set_ylabel("participation ratio of the update")
    axes[0, 0].legend(fontsize=7, frameon=False)
    return figure


def _indexed(result: dict[str, Any]) -> tuple[Any, ...]:
    """Records by method, projection and layer, and all of these in their order."""
    records = {(one["method"], one["projection"], one["layer"]): one for one in result["layers"]}
    return records, *(list(dict.fromkeys(key[place] for key in records)) for place in range(3))
