"""The method written once more for reading: NumPy, float64, one head at a time, straight from the equations.

Backends never import this module; it is what they are checked against. Symbols: s the activation, u a hidden
pre-activation, z a normalised head embedding, g a gain.
"""

import math
from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from hora_spec.activations import LEAKY_RELU_SLOPE
from hora_spec.errors import HoraError
from hora_spec.layout import Layout
from hora_spec.shapes import LayerShape, check_params, name_of_a
from hora_spec.spec import LAYER_NORM_EPS, AdapterSpec

Array = NDArray[Any]
Params = Mapping[str, Array]
ArrayT = TypeVar("ArrayT")


class Factors(NamedTuple, Generic[ArrayT]):
    """The generated factors of one projection, NumPy arrays here and a backend's own arrays there.

    ``a`` has shape (rank, embed), or (heads, rank, embed) when A is free per head; ``b`` (heads, head_dim, rank). Both
    are arrays of the backend that made them.
    """

    a: Any
    b: Any


def factors(spec: AdapterSpec, layer: LayerShape, params: Params) -> dict[str, Factors]:
    """Factors of every projection: ``B_i = g_B W_2 s(W_1 LN(E_i)) + residual`` and A (spec G1 to G6, G8).

    Parameters
    ----------
    spec, layer
        Method and shapes.
    params
        Canonical name to array, any float dtype.

    Returns
    -------
    dict
        Projection to `Factors` in float64.

    Raises
    ------
    HoraError
        If the parameters do not fit (spec S6, S7).
    """
    params = _float64(spec, layer, params)
    return {p: Factors(_factor_a(spec, params, p), _factor_b(spec, layer, params, p)) for p in layer}


def delta(spec: AdapterSpec, layer: LayerShape, params: Params) -> dict[str, Array]:
    """Dense update of every projection, ``scaling * stack_i(B_i) A`` (spec D1, D2).

    Returns
    -------
    dict
        Projection to float64 array (heads * head_dim, embed); row ``i * head_dim + j`` is row j of head i.
    """
    result = {}
    for p, (a, b) in factors(spec, layer, params).items():
        a_of = [a] * len(b) if spec.shares_a else list(a)
        result[p] = spec.scaling * np.concatenate([b_i @ a_i for b_i, a_i in zip(b, a_of, strict=True)])
    return result


def hora_linear(x: Array, weight: Array, bias: Array | None, factors: Factors, scaling: float) -> Array:
    """Adapted projection ``x (W + delta)^T + bias`` in float64 (spec D3).

    Parameters
    ----------
    x
        (..., embed).
    weight
        Canonical frozen weight (heads * head_dim, embed).
    bias
        (heads * head_dim,) or None.
    factors, scaling
        The projection's factors and ``spec.scaling``.

    Returns
    -------
    Array
        (..., heads * head_dim).
    """
    a, b = factors
    rows = [b_i @ (a if a.ndim == 2 else a[i]) for i, b_i in enumerate(b)]
    y = np.float64(x) @ (np.float64(weight) + scaling * np.concatenate(rows)).T
    return y if bias is None else y + bias


def merge(weight: Array, delta: Array, layout: Layout) -> Array:
    """Stored weight with `delta` added in its window, summed in float64 and rounded once (spec M1, M3).

    Parameters
    ----------
    weight
        The stored weight, in its stored form and dtype.
    delta
        Canonical (heads * head_dim, embed), or (layers, heads * head_dim, embed) when the layout is stacked.
    layout
        Where the projection sits.

    Returns
    -------
    Array
        A new array of weight's shape and dtype; `weight` is unchanged.

    Raises
    ------
    HoraError
        If the delta is not finite, or the sum leaves the range of weight's dtype (spec M3).
    """
    if not np.isfinite(delta).all():
        raise HoraError("only a finite delta can be merged, got NaN or infinity: training diverged (spec M3)")
    entries = _entries(layout, weight.shape)
    with np.errstate(over="ignore"):
        total = (np.float64(weight.ravel()[entries]) + np.float64(delta)).astype(weight.dtype)
    if not np.isfinite(total.astype(np.float64)).all():
        raise HoraError(f"the merged weight overflows {weight.dtype}: merge into a wider dtype (spec M3)")
    merged = weight.ravel().copy()
    merged[entries] = total
    return merged.reshape(weight.shape)


def grads(
    spec: AdapterSpec, layer: LayerShape, params: Params, cotangents: Mapping[str, Array]
) -> dict[str, NDArray[np.float64]]:
    """Gradients of ``sum_p <cotangents_p, delta_p>`` with respect to every parameter, derived by hand (spec G7).

    Parameters
    ----------
    spec, layer, params
        As for `delta`.
    cotangents
        Projection to array (heads * head_dim, embed): the loss's gradient with respect to each delta.

    Returns
    -------
    dict
        Canonical name to float64 array of the parameter's shape; zero for a fixed A.
    """
    params = _float64(spec, layer, params)
    result = {key: np.zeros(value.shape) for key, value in params.items()}
    for p, (a, b) in factors(spec, layer, params).items():
        shape = layer[p]
        blocks = np.float64(cotangents[p]).reshape(shape.num_heads, shape.head_dim, shape.embed_dim)
        grad_a = np.zeros(a.shape)
        for i, block in enumerate(blocks):
            a_i = a if spec.shares_a else a[i]
            grad_a_i = spec.scaling * b[i].T @ block
            if spec.shares_a:
                grad_a += grad_a_i
            else:
                grad_a[i] = grad_a_i
            _backward_b(spec, layer, params, p, i, spec.scaling * block @ a_i.T, result)
        _backward_a(spec, params, p, grad_a, result)
    return result


def activation(name: str, u: Array) -> Array:
    """``s(u)`` (spec G3)."""
    if name == "leaky_relu":
        return np.where(u > 0, u, LEAKY_RELU_SLOPE * u)
    if name == "relu":
        return np.maximum(u, 0)
    if name == "gelu":
        return u * _normal_cdf(u)
    if name == "sigmoid":
        return (1 + np.tanh(u / 2)) / 2
    if name == "tanh":
        return np.tanh(u)
    return u


def activation_slope(name: str, u: Array) -> Array:
    """``s'(u)``; at a kink the slope for negative input (spec G3)."""
    if name == "leaky_relu":
        return np.where(u > 0, 1.0, LEAKY_RELU_SLOPE)
    if name == "relu":
        return np.where(u > 0, 1.0, 0.0)
    if name == "gelu":
        return _normal_cdf(u) + u * np.exp(-u * u / 2) / math.sqrt(2 * math.pi)
    if name == "sigmoid":
        return (1 - np.tanh(u / 2) ** 2) / 4
    if name == "tanh":
        return 1 - np.tanh(u) ** 2
    return np.ones_like(u)


def normalize(x: Array) -> Array:
    """``LN(x) = (x - mean) / sqrt(var + eps)`` along the first axis, head_embed (spec G1)."""
    centred = x - x.mean(axis=0)
    return centred / np.sqrt((centred**2).mean(axis=0) + LAYER_NORM_EPS)


def _head_embedding(spec: AdapterSpec, layer: LayerShape, params: Params, p: str, head: int) -> tuple[Array, Array]:
    """Mean raw embedding (head_embed, rank) of the head's group, and what enters the hypernetwork (spec G2)."""
    group = layer.group_size(p)
    mean = params["head_embed"][head * group : (head + 1) * group].mean(axis=0)
    return mean, normalize(mean) if spec.normalize else mean


def _factor_a(spec: AdapterSpec, params: Params, p: str) -> Array:
    if not spec.generates_a:
        return params[name_of_a(spec, p)]
    hidden = activation(spec.activation, params["a_in"] @ np.diag(params["a_seed"]))
    return (spec.gain_a * params[f"a_out.{p}"] @ hidden).T


def _factor_b(spec: AdapterSpec, layer: LayerShape, params: Params, p: str) -> Array:
    if not spec.generates_b:
        return params[f"b.{p}"]
    heads = []
    for i in range(layer[p].num_heads):
        _, z = _head_embedding(spec, layer, params, p, i)
        b_i = spec.gain_b * params[f"b_out.{p}"] @ activation(spec.activation, params["b_in"] @ z)
        heads.append(b_i + _weight_of_residual(spec, params, p) * params[f"b.{p}"][i] if spec.residual else b_i)
    return np.stack(heads)


def _weight_of_residual(spec: AdapterSpec, params: Params, p: str) -> float:
    return 1.0 if spec.gate is None else spec.gain_residual * float(params[f"gate.{p}"][0])


def _backward_a(spec: AdapterSpec, params: Params, p: str, grad_a: Array, result: dict[str, Array]) -> None:
    if not spec.generates_a:
        result[name_of_a(spec, p)] += grad_a if spec.trains_a else 0.0
        return
    u = params["a_in"] @ np.diag(params["a_seed"])
    result[f"a_out.{p}"] += spec.gain_a * grad_a.T @ activation(spec.activation, u).T
    grad_u = spec.gain_a * (params[f"a_out.{p}"].T @ grad_a.T) * activation_slope(spec.activation, u)
    result["a_in"] += grad_u @ np.diag(params["a_seed"])
    result["a_seed"] += np.diag(params["a_in"].T @ grad_u)


def _backward_b(
    spec: AdapterSpec,
    layer: LayerShape,
    params: Params,
    p: str,
    head: int,
    grad_b: Array,
    result: dict[str, Array],
) -> None:
    if spec.residual:
        result[f"b.{p}"][head] += _weight_of_residual(spec, params, p) * grad_b
    if spec.gate is not None:
        result[f"gate.{p}"] += spec.gain_residual * (grad_b * params[f"b.{p}"][head]).sum()
    if not spec.generates_b:
        result[f"b.{p}"][head] += grad_b
    if not spec.generates_b:
        return
    mean, z = _head_embedding(spec, layer, params, p, head)
    u = params["b_in"] @ z
    result[f"b_out.{p}"] += spec.gain_b * grad_b @ activation(spec.activation, u).T
    grad_u = spec.gain_b * (params[f"b_out.{p}"].T @ grad_b) * activation_slope(spec.activation, u)
    result["b_in"] += grad_u @ z.T
    grad_z = params["b_in"].T @ grad_u
    if spec.normalize:
        std = np.sqrt(mean.var(axis=0) + LAYER_NORM_EPS)
        grad_z = (grad_z - grad_z.mean(axis=0) - z * (grad_z * z).mean(axis=0)) / std
    group = layer.group_size(p)
    result["head_embed"][head * group : (head + 1) * group] += grad_z / group


def _entries(layout: Layout, shape: tuple[int, ...]) -> Array:
    """Number in the stored weight of each canonical entry (heads * head_dim, embed), layers first (spec L1, L2)."""
    numbers, axes = np.arange(math.prod(shape)).reshape(shape), layout.axes
    if (window := layout.window) is not None:
        blocks = np.split(numbers, window.blocks, window.axis)
        parts = [block.swapaxes(0, window.axis)[window.start : window.stop] for block in blocks]
        numbers = np.concatenate(parts).swapaxes(0, window.axis)
    order = [axes.index(axis) for axis in ("l", "g", "h", "hk", "k", "d") if axis in axes]
    numbers = numbers.transpose(order + [i for i, axis in enumerate(axes) if axis == "1"])
    embed = numbers.shape[order.index(axes.index("d"))]
    return numbers.reshape(numbers.shape[0], -1, embed) if layout.stacked else numbers.reshape(-1, embed)


def _normal_cdf(u: Array) -> Array:
    return (1 + np.vectorize(math.erf, otypes=[float])(u / math.sqrt(2))) / 2


def _float64(spec: AdapterSpec, layer: LayerShape, params: Params) -> dict[str, Array]:
    check_params(spec, layer, params)
    return {key: np.asarray(value, np.float64) for key, value in params.items()}
