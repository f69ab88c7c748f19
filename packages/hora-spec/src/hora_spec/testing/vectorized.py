"""A backend as backends are: vectorised over heads, in the dtype of its input, NumPy alone.

It shows what the tolerance allows an honest implementation, and is the ground on which mutants are first planted.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hora_spec.activations import LEAKY_RELU_SLOPE
from hora_spec.errors import HoraError
from hora_spec.init import init_params
from hora_spec.layout import Layout
from hora_spec.reference import Factors
from hora_spec.shapes import LayerShape, name_of_a
from hora_spec.spec import LAYER_NORM_EPS, AdapterSpec
from hora_spec.testing.backend import Backend, LinearGrads

Array = NDArray[Any]
Params = Mapping[str, Array]

# einsum letters: h heads, k head_dim, d embed, r rank, m hidden, e head_embed, n tokens


def _factors(spec: AdapterSpec, layer: LayerShape, params: Params) -> dict[str, Factors]:
    return {p: Factors(_factor_a(spec, params, p), _factor_b(spec, layer, params, p)) for p in layer}


def _delta(spec: AdapterSpec, layer: LayerShape, params: Params) -> dict[str, Array]:
    return {p: _dense(*both, spec.scaling) for p, both in _factors(spec, layer, params).items()}


def _hora_linear(x: Array, weight: Array, bias: Array | None, factors: Factors, scaling: float) -> Array:
    a, b = (part.astype(x.dtype) for part in factors)
    y = _einsum("...d,od->...o", x, weight)
    if bias is not None:
        y = y + bias
    if a.ndim == 2:
        rows = _einsum("...r,hkr->...hk", _einsum("...d,rd->...r", x, a), b)
    else:
        rows = _einsum("...hr,hkr->...hk", _einsum("...d,hrd->...hr", x, a), b)
    return y + _like(scaling, x) * rows.reshape(y.shape)


def _linear_grads(
    x: Array, weight: Array, bias: Array | None, factors: Factors, scaling: float, cotangent: Array
) -> LinearGrads:
    a, b = (part.astype(x.dtype) for part in factors)
    tokens = x.reshape(-1, x.shape[-1])
    rows = cotangent.reshape(len(tokens), *b.shape[:2])
    of_a, thin = ("rd", "nr") if a.ndim == 2 else ("hrd", "nhr")
    back = _like(scaling, x) * _einsum(f"nhk,hkr->{thin}", rows, b)
    grad_x = _einsum("no,od->nd", cotangent.reshape(len(tokens), -1), weight) + _einsum(f"{thin},{of_a}->nd", back, a)
    grad_a = _einsum(f"{thin},nd->{of_a}", back, tokens)
    grad_b = _like(scaling, x) * _einsum(f"nhk,{thin}->hkr", rows, _einsum(f"nd,{of_a}->{thin}", tokens, a))
    return LinearGrads(grad_x.reshape(x.shape), grad_a, grad_b)


def _merge(weight: Array, delta: Array, layout: Layout) -> Array:
    if not np.isfinite(delta).all():
        raise HoraError("only a finite delta can be merged, got NaN or infinity: training diverged (spec M3)")
    wide = np.result_type(weight.dtype, np.float32)
    merged = weight.copy()
    with np.errstate(over="ignore"):
        total = weight[layout.index(weight.shape)].astype(wide) + layout.write(delta.astype(wide), weight.shape)
        merged[layout.index(weight.shape)] = total.astype(weight.dtype)
    if not np.isfinite(merged[layout.index(weight.shape)].astype(wide)).all():
        raise HoraError(f"the merged weight overflows {weight.dtype}: merge into a wider dtype (spec M3)")
    return merged


def _grads(spec: AdapterSpec, layer: LayerShape, params: Params, cotangents: Mapping[str, Array]) -> dict[str, Array]:
    result = {key: np.zeros_like(value) for key, value in params.items()}
    for p, (a, b) in _factors(spec, layer, params).items():
        rows = cotangents[p].reshape(*b.shape[:2], -1)
        scaling = _like(spec.scaling, rows)
        grad_a = scaling * np.einsum("hkr,hkd->rd" if a.ndim == 2 else "hkr,hkd->hrd", b, rows)
        grad_b = scaling * np.einsum("hkd,rd->hkr" if a.ndim == 2 else "hkd,hrd->hkr", rows, a)
        if spec.generates_a:
            u = params["a_in"] * params["a_seed"]
            result[f"a_out.{p}"] += _like(spec.gain_a, u) * np.einsum("rd,mr->dm", grad_a, _activation(spec, u))
            grad_u = _like(spec.gain_a, u) * np.einsum("dm,rd->mr", params[f"a_out.{p}"], grad_a) * _slope(spec, u)
            result["a_in"] += grad_u * params["a_seed"]
            result["a_seed"] += (grad_u * params["a_in"]).sum(0)
        elif spec.trains_a:
            result[name_of_a(spec, p)] += grad_a
        if spec.residual or not spec.generates_b:
            result[f"b.{p}"] += _gated(spec, params, p, grad_b)
        if spec.gate is not None:
            result[f"gate.{p}"] += _like(spec.gain_residual, grad_b) * (grad_b * params[f"b.{p}"]).sum()
        if spec.generates_b:
            _grads_b(spec, layer, params, p, grad_b, result)
    return result


def _grads_b(
    spec: AdapterSpec, layer: LayerShape, params: Params, p: str, grad_b: Array, result: dict[str, Array]
) -> None:
    z, std = _embedding(spec, layer, params, p)
    u = np.einsum("me,her->hmr", params["b_in"], z)
    grad_b = _like(spec.gain_b, u) * grad_b
    result[f"b_out.{p}"] += np.einsum("hkr,hmr->km", grad_b, _activation(spec, u))
    grad_u = np.einsum("km,hkr->hmr", params[f"b_out.{p}"], grad_b) * _slope(spec, u)
    result["b_in"] += np.einsum("hmr,her->me", grad_u, z)
    grad_z = np.einsum("me,hmr->her", params["b_in"], grad_u)
    if spec.normalize:  # as automatic differentiation would go
        for_centred = (grad_z - z * (grad_z * z).mean(1, keepdims=True)) / std
        grad_z = for_centred - for_centred.mean(1, keepdims=True)
    group = layer.group_size(p)
    result["head_embed"] += np.repeat(grad_z / _like(group, u), group, axis=0)


def _factor_a(spec: AdapterSpec, params: Params, p: str) -> Array:
    if not spec.generates_a:
        return params[name_of_a(spec, p)]
    hidden = _activation(spec, params["a_in"] * params["a_seed"])
    return _like(spec.gain_a, hidden) * np.einsum("dm,mr->rd", params[f"a_out.{p}"], hidden)


def _factor_b(spec: AdapterSpec, layer: LayerShape, params: Params, p: str) -> Array:
    if not spec.generates_b:
        return params[f"b.{p}"]
    hidden = _activation(spec, np.einsum("me,her->hmr", params["b_in"], _embedding(spec, layer, params, p)[0]))
    b = _like(spec.gain_b, hidden) * np.einsum("km,hmr->hkr", params[f"b_out.{p}"], hidden)
    return b + _gated(spec, params, p, params[f"b.{p}"]) if spec.residual else b


def _gated(spec: AdapterSpec, params: Params, p: str, free: Array) -> Array:
    return free if spec.gate is None else _like(spec.gain_residual, free) * params[f"gate.{p}"] * free


def _embedding(spec: AdapterSpec, layer: LayerShape, params: Params, p: str) -> tuple[Array, Array | None]:
    raw = params["head_embed"]
    mean = raw.reshape(layer[p].num_heads, -1, *raw.shape[1:]).mean(1)
    if not spec.normalize:
        return mean, None
    centred = mean - mean.mean(1, keepdims=True)
    std = np.sqrt((centred * centred).mean(1, keepdims=True) + _like(LAYER_NORM_EPS, raw))
    return centred / std, std


def _dense(a: Array, b: Array, scaling: float) -> Array:
    rows = np.einsum("hkr,rd->hkd" if a.ndim == 2 else "hkr,hrd->hkd", b, a)
    return _like(scaling, rows) * rows.reshape(-1, a.shape[-1])


def _einsum(subscripts: str, *arrays: Array) -> Array:
    """Products summed in float32 or better, rounded to the arrays' dtype."""
    wide = np.result_type(arrays[0].dtype, np.float32)
    return np.einsum(subscripts, *(array.astype(wide) for array in arrays)).astype(arrays[0].dtype)


def _like(constant: float, array: Array) -> Array:
    return np.asarray(constant, array.dtype)


def _erf(u: Array) -> Array:
    return np.vectorize(math.erf, otypes=[float])(u).astype(u.dtype)


def _activation(spec: AdapterSpec, u: Array) -> Array:
    one, half = _like(1, u), _like(0.5, u)
    return {
        "leaky_relu": lambda: np.where(u > 0, u, _like(LEAKY_RELU_SLOPE, u) * u),
        "relu": lambda: np.maximum(u, 0),
        "gelu": lambda: half * u * (one + _erf(u * _like(math.sqrt(0.5), u))),
        "sigmoid": lambda: half * (one + np.tanh(half * u)),
        "tanh": lambda: np.tanh(u),
        "identity": lambda: u,
    }[spec.activation]()


def _slope(spec: AdapterSpec, u: Array) -> Array:
    one, half = _like(1, u), _like(0.5, u)
    s = _activation(spec, u)
    bell = _like(1 / math.sqrt(2 * math.pi), u)
    return {
        "leaky_relu": lambda: np.where(u > 0, one, _like(LEAKY_RELU_SLOPE, u)),
        "relu": lambda: np.where(u > 0, one, _like(0, u)),
        "gelu": lambda: half * (one + _erf(u * _like(math.sqrt(0.5), u))) + u * bell * np.exp(-half * u * u),
        "sigmoid": lambda: s * (one - s),
        "tanh": lambda: one - s * s,
        "identity": lambda: np.ones_like(u),
    }[spec.activation]()


VECTORIZED = Backend("vectorized", init_params, _factors, _delta, _hora_linear, _linear_grads, _merge, _grads)
"""Computes in float32 when given float32."""
