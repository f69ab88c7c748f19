"""Exact conversion to a standard LoRA adapter: factors are copied into place, nothing is decomposed (spec F6)."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hora_spec import reference
from hora_spec.adapter import Adapter, AdapterLayer, Site, check_adapter
from hora_spec.directory import write_pair
from hora_spec.errors import HoraError
from hora_spec.files import PREFIX, pattern
from hora_spec.spec import AdapterSpec
from hora_spec.tensors import encode

_Index = slice | NDArray[np.intp]
_ADAPTABLE = {"weight", "kernel", "in_proj_weight"}
_CARRIED = ("task_type", "base_model_name_or_path", "revision", "auto_mapping", "modules_to_save", "peft_version")


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
    """

    a: NDArray[np.float64]
    b: NDArray[np.float64]
    alpha: float
    parameter: str
    fan_in_fan_out: bool

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


def export_lora(adapter: Adapter, directory: str | os.PathLike[str], *, dtype: DTypeLike = np.float32) -> None:
    """Write an adapter as a standard PEFT LoRA directory, which PEFT, vLLM and others read (spec F6).

    Parameters
    ----------
    adapter
        The adapter; modules that were trained whole travel along.
    directory
        New, empty, or left by an export that was interrupted.
    dtype
        Float16, float32 or float64: the LoRA tensors are computed in float64 and rounded once.

    Raises
    ------
    HoraError
        As `to_lora`; or if the directory holds anything, or a factor overflows `dtype` (spec F3, F6). Nothing has been
        written then.
    """
    modules = to_lora(adapter)
    tensors: dict[str, NDArray[Any]] = {PREFIX + name: value for name, value in adapter.modules.items()}
    for path, module in modules.items():
        tensors |= {f"{PREFIX}{path}.{name}": _cast(path, value, dtype) for name, value in _tensors(module).items()}
    write_pair(Path(directory), _config(modules, adapter.config), encode(tensors), replace=False)


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
    return LoraModule(a, b, scaling * rank, site.parameter, site.layout.axes == ("d", "hk"))


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


def _tensors(module: LoraModule) -> dict[str, NDArray[np.float64]]:
    tensors = {"lora_A.weight": module.a, "lora_B.weight": module.b}
    if module.parameter == "in_proj_weight":
        # PEFT 0.21 adapts in_proj and out_proj of nn.MultiheadAttention together or not at all: out_proj by zero
        embed = module.a.shape[1]
        tensors["base_layer.out_proj.lora_A.weight"] = np.zeros((module.rank, embed))
        tensors["base_layer.out_proj.lora_B.weight"] = np.zeros((embed, module.rank))
    return tensors


def _config(modules: Mapping[str, LoraModule], config: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's LoRA config; the largest rank is the default, because servers allocate by it."""
    default = max(modules.values(), key=lambda module: module.rank)
    ranks = {pattern(path): module.rank for path, module in modules.items() if module.rank != default.rank}
    alphas = {pattern(path): _number(module.alpha) for path, module in modules.items() if module.alpha != default.alpha}
    return {
        **{key: config[key] for key in _CARRIED if key in config},
        "peft_type": "LORA",
        "r": default.rank,
        "lora_alpha": _number(default.alpha),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": list(modules),
        "lora_dropout": 0.0,
        "bias": {"hora_only": "lora_only"}.get(bias := config.get("bias", "none"), bias),
        "fan_in_fan_out": all(module.fan_in_fan_out for module in modules.values()),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _cast(path: str, value: NDArray[np.float64], dtype: DTypeLike) -> NDArray[Any]:
    if np.dtype(dtype) not in (np.float16, np.float32, np.float64):
        raise HoraError(f"LoRA tensors are float16, float32 or float64, got {np.dtype(dtype)} (spec F6)")
    with np.errstate(over="ignore"):
        cast = value.astype(dtype)
    if not np.isfinite(cast).all():
        raise HoraError(f"the LoRA factors of {path} overflow {cast.dtype}: export in a wider dtype (spec F6)")
    return cast
