"""Heat maps, distributions and spectra, from a result alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

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
    paths = [folder / f"{stem}-{kind}.svg" for kind in ("heatmaps", "distributions")]
    for figure, path in zip((heatmaps(result), distributions(result)), paths, strict=True):
        save(figure, path)
    return paths


def heatmaps(result: dict[str, Any]) -> Figure:
    """Cosines between the heads' updates: a method per row; first, middle and last layer of Q and of V."""
    methods, layers = _methods(result), sorted({record["layer"] for record in result["layers"]})
    shown = [(p, layer) for p in _projections(result) for layer in (layers[0], layers[len(layers) // 2], layers[-1])]
    figure = Figure(figsize=(1.5 * len(shown), 1.5 * len(methods)), layout="constrained")
    axes = figure.subplots(len(methods), len(shown), squeeze=False)
    for row, method in zip(axes, methods, strict=True):
        for axis, (projection, layer) in zip(row, shown, strict=True):
            found = _find(result, method, projection, layer)
            image = axis.imshow(found["cosines_delta"], vmin=-1, vmax=1, cmap="RdBu_r")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"{projection}, layer {layer}", fontsize=7)
        row[0].set_ylabel(method, fontsize=7)
    figure.colorbar(image, ax=axes, shrink=0.6, label="cosine similarity of two heads' updates")
    return figure


def distributions(result: dict[str, Any]) -> Figure:
    """All cosines between different heads, and the participation ratio by layer, of every method."""
    methods = _methods(result)
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    for column, projection in zip(axes.T, _projections(result), strict=True):
        for index, method in enumerate(methods):
            records = [
                record
                for record in result["layers"]
                if (record["method"], record["projection"]) == (method, projection)
            ]
            cosines = np.concatenate([_off_diagonal(record["cosines_delta"]) for record in records])
            column[0].hist(cosines, np.linspace(-1, 1, 41), histtype="step", color=f"C{index}", label=method)
            ratios = [record["participation_ratio"] for record in records]
            column[1].plot([record["layer"] for record in records], ratios, color=f"C{index}", marker=".")
        column[0].set_xlabel(f"cosine between heads, {projection}")
        column[1].set_xlabel(f"layer, {projection}")
    axes[0, 0].set_ylabel("pairs of heads")
    axes[1, 0].set_ylabel("participation ratio of the update")
    axes[0, 0].legend(fontsize=7, frameon=False)
    return figure


def _methods(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(record["method"] for record in result["layers"]))


def _projections(result: dict[str, Any]) -> list[str]:
    return sorted({record["projection"] for record in result["layers"]})


def _find(result: dict[str, Any], method: str, projection: str, layer: int) -> dict[str, Any]:
    wanted = (method, projection, layer)
    return next(r for r in result["layers"] if (r["method"], r["projection"], r["layer"]) == wanted)


def _off_diagonal(matrix: list[list[float]]) -> np.ndarray:
    array = np.array(matrix)
    return array[~np.eye(len(array), dtype=bool)]
