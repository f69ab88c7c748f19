"""Exact conversion to a standard LoRA adapter: factors are copied into place, nothing is decomposed (spec F6)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hora_spec import reference
from hora_spec.adapter import Adapter, AdapterLayer, Site, check_adapter
from hora_spec.errors import HoraError
from hora_spec.spec import AdapterSpec

_Index = slice | NDArray[np.intp]
_ADAPTABLE = {"weight", "kernel", "in_proj_weight"}


@dataclass(frozen=True, slots=True, eq=False)
class LoraModule:
    """LoRA factors of one module, ``delta = alpha / rank * b @ a``.

    Parameters
    ----------
    a
        Float64 array (rank, in_features).
    b
        Float64 array (out_features, rank).
    alpha
        LoRA's alpha, ``scaling * rank``.
    parameter
        The adapted weight of the module.
    fan_in_fan_out
        Whether the module stores its weight (in_features, out_features).
    kernel_axes
        Axes of length one that the weight has behind the others, as a convolution with a kernel of one.
    """

    a: NDArray[np.float64]
    b: NDArray[np.float64]
    alpha: float
    parameter: str
    fan_in_fan_out: bool
    kernel_axes: int = 0

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return len(self.a)


def to_lora(adapter: Adapter) -> dict[str, LoraModule]:
    """LoRA factors of every adapted module, in model order (spec F6).

    A common A gives rank r: ``a = A``, ``b = stack_i(B_i)``. An A per head gives rank ``heads * r`` with a
    block-diagonal b. Projections of one fused weight give one block each; their ranks add up.

    Parameters
    ----------
    adapter
        The adapter.

    Returns
    -------
    dict
        Module path to `LoraModule`.

    Raises
    ------
    HoraError
        If the adapter is inconsistent, or adapts a weight that LoRA cannot: an unknown parameter, or a layout that is
        no (out, in) matrix (spec F5, F6).
    """
    check_adapter(adapter)
    pieces: dict[str, list[_Piece]] = {}
    for layer in adapter.layers.values():
        for piece in _pieces(layer):
            pieces.setdefault(piece.site.module, []).append(piece)
    return {module: _join(module, parts) for module, parts in pieces.items()}


def portable(modules: Mapping[str, LoraModule]) -> dict[str, LoraModule]:
    """The same updates in the one form that no server misreads: one rank for all, and a scaling of 1 (spec F6).

    Servers differ in what they make of ranks and alphas that vary; llama.cpp scales by alpha over the rank of each
    tensor, whatever the patterns of the config say. Here every module has the largest rank, filled up with zeros,
    alpha is that rank, and b has taken in the scaling.

    Parameters
    ----------
    modules
        As from `to_lora`.

    Returns
    -------
    dict
        Module path to `LoraModule`, float64: nothing has been rounded for a file yet.
    """
    rank = max(module.rank for module in modules.values())
    return {path: _padded(module, rank) for path, module in modules.items()}


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """One projection: a (rank, embed), b (heads * head_dim, rank), and where they go."""

    site: Site
    spec: AdapterSpec
    a: NDArray[np.float64]
    b: NDArray[np.float64]


def _pieces(layer: AdapterLayer) -> list[_Piece]:
    factors = reference.factors(layer.spec, layer.shape, layer.params)
    return [_Piece(site, layer.spec, *_matrices(*factors[p])) for p, site in layer.sites.items()]


def _matrices(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two matrices whose product is the delta over scaling; an A per head makes B block-diagonal."""
    heads, head_dim, rank = b.shape
    if a.ndim == 2:
        return a, b.reshape(heads * head_dim, rank)
    blocks = np.zeros((heads, head_dim, heads, rank))
    for i in range(heads):
        blocks[i, :, i] = b[i]
    return a.reshape(heads * rank, -1), blocks.reshape(heads * head_dim, heads * rank)


def _join(module: str, pieces: list[_Piece]) -> LoraModule:
    """Factors of a module from those of its projections, each in its own rows and rank components."""
    site, scaling = pieces[0].site, pieces[0].spec.scaling
    if (parameters := {piece.site.parameter for piece in pieces}) - _ADAPTABLE or len(parameters) > 1:
        raise HoraError(
            f"LoRA adapts one of {sorted(_ADAPTABLE)} of a module, got {sorted(parameters)} of {module}: merge the "
            "adapter instead (spec F6)"
        )
    rank = sum(len(piece.a) for piece in pieces)
    _, _, shape = _place(site)
    a, b = np.zeros((rank, shape[1])), np.zeros((shape[0], rank))
    start = 0
    for piece in pieces:
        rows, columns, _ = _place(piece.site)
        stop = start + len(piece.a)
        a[start:stop, columns] = piece.a
        b[rows, start:stop] = piece.b * (piece.spec.scaling / scaling)
        start = stop
    axes, kernel_axes = site.layout.squeezed.axes, site.layout.axes.count("1")
    if kernel_axes and site.layout.axes != ("hk", "d", *"1" * kernel_axes):
        raise HoraError(
            f"LoRA adapts convolutions of weights (out, in, 1, ...), got {site.layout} of {module}: merge the adapter "
            "instead (spec F6)"
        )
    return LoraModule(a, b, scaling * rank, site.parameter, axes == ("d", "hk"), kernel_axes)


def _place(site: Site) -> tuple[_Index, _Index, tuple[int, int]]:
    """Rows and columns of a projection in the (out, in) matrix of its module, and that matrix's shape."""
    layout, rows = site.layout, site.layout.rows(site.weight_shape)
    shape = (rows.size, site.weight_shape[layout.axes.index("d")])
    span, axis = layout.span(site.weight_shape), layout.window and layout.axes[layout.window.axis]
    if axis == "d" and span is not None:
        return rows.index, span.index, shape
    if axis is not None and axis not in layout.row_axes:
        raise HoraError(
            f"LoRA adapts rows of a matrix (out, in), got {layout} for {site.module}: merge the adapter instead "
            "(spec F6)"
        )
    return rows.index, slice(None), shape


def _padded(module: LoraModule, rank: int) -> LoraModule:
    a, b = np.zeros((rank, module.a.shape[1])), np.zeros((len(module.b), rank))
    a[: module.rank] = module.a
    b[:, : module.rank] = module.b * (module.alpha / module.rank)
    return replace(module, a=a, b=b, alpha=float(rank))
