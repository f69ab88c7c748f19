"""The one tolerance: how far an honest implementation may be from the exact result, element by element.

Derivation. The equations of the method are run once in float64 with `Rounded` arrays, which carry a bound of the
rounding error that arithmetic in the format under test makes (see `hora_spec.testing.rounding`). The bound therefore
knows the lengths of the dot products, the magnitudes ``|W||x|`` that cancel in them, and the conditioning of each step:

* normalisation divides by ``sqrt(var + eps)``: an error of ``gamma_n mean|x|`` in the mean is amplified by ``1 / std``.
  For a constant column that is ``1 / sqrt(eps)``, and float32 may lose everything;
* an activation is Lipschitz, and a function of the mathematics library is trusted to eight unit roundoffs;
* the slope of an activation jumps at its kink: where the error of u reaches across it, the bound is the jump.

Two orders of evaluation are equally honest in two places, and the larger bound of both holds: the adapted projection
(two thin products, or one with the updated weight), and the backward pass of normalisation (closed formula, or
differentiation step by step). A variance as ``mean(x^2) - mean(x)^2`` is not honest: it squares the condition.

All functions take inputs as the implementation gets them. The reference rounds too, in float64, so a comparison with
it allows ``error(format) + error(float64)``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hora_spec import reference
from hora_spec.activations import LEAKY_RELU_SLOPE
from hora_spec.reference import Factors
from hora_spec.shapes import LayerShape, name_of_a
from hora_spec.spec import LAYER_NORM_EPS, AdapterSpec
from hora_spec.testing.rounding import Format, Rounded, either, join, total

Array = NDArray[Any]
Params = Mapping[str, Array]

LIBRARY_ROUNDINGS = 8
"""Unit roundoffs that erf, tanh and the logistic function may be off, relative to their range."""


def factors(spec: AdapterSpec, layer: LayerShape, params: Params, fmt: Format) -> dict[str, tuple[Rounded, Rounded]]:
    """``(A, B)`` of every projection, as in `hora_spec.reference.factors`."""
    exact = _exact(params, fmt)
    return {p: (_factor_a(spec, exact, p), _factor_b(spec, layer, exact, p)) for p in layer}


def delta(spec: AdapterSpec, layer: LayerShape, params: Params, fmt: Format) -> dict[str, Rounded]:
    """Dense updates, as in `hora_spec.reference.delta`."""
    return {p: _update(a, b, spec.scaling) for p, (a, b) in factors(spec, layer, params, fmt).items()}


def linear(x: Array, weight: Array, bias: Array | None, factors: Factors, scaling: float, *, fmt: Format) -> Rounded:
    """Adapted projection, as in `hora_spec.reference.hora_linear`; the factors are rounded to the format first."""
    base, tokens = Rounded.exact(weight, fmt), Rounded.exact(x.reshape(-1, x.shape[-1]), fmt)
    a, b = (Rounded.cast(part, fmt) for part in factors)
    thin = (tokens @ a.each(_transpose)) @ b.each(_transpose)  # (heads, tokens, head_dim)
    branch = [tokens @ base.each(_transpose), thin.each(_heads_last).scale(scaling)]
    merged = [tokens @ (base + _update(a, b, scaling)).each(_transpose)]
    shift = [] if bias is None else [Rounded.exact(np.broadcast_to(bias, branch[0].shape), fmt)]
    return either(total(branch + shift), total(merged + shift)).each(lambda y: y.reshape(*x.shape[:-1], len(weight)))


def linear_grads(
    x: Array, weight: Array, factors: Factors, scaling: float, cotangent: Array, *, fmt: Format
) -> tuple[Rounded, Rounded, Rounded]:
    """Gradients of the adapted projection with respect to ``(x, A, B)``, as in `hora_spec.testing.LinearGrads`."""
    tokens = Rounded.exact(x.reshape(-1, x.shape[-1]), fmt)
    a, b = (Rounded.cast(part, fmt) for part in factors)
    heads, head_dim, _ = b.shape
    rows = Rounded.exact(cotangent.reshape(-1, heads * head_dim), fmt)
    by_head = rows.each(lambda y: y.reshape(-1, heads, head_dim).swapaxes(0, 1))
    base = Rounded.exact(weight, fmt)
    grad_weight = by_head.each(_transpose) @ tokens  # (heads, head_dim, embed), never formed by a good backend

    shared = a.value.ndim == 2
    thin = rows @ b.each(_join_heads) if shared else by_head @ b  # ([heads,] tokens, rank)
    back = thin @ a if shared else (thin @ a).sum(0)
    grad_x = either(
        total([rows @ base, back.scale(scaling)]),
        rows @ (base + _update(a, b, scaling)),
    ).each(lambda grad: grad.reshape(x.shape))

    dense = grad_weight.each(_join_heads) if shared else grad_weight
    b_rows = b.each(_join_heads) if shared else b
    grad_a = either(thin.each(_transpose) @ tokens, b_rows.each(_transpose) @ dense).scale(scaling)
    grad_b = either(by_head.each(_transpose) @ (tokens @ a.each(_transpose)), grad_weight @ a.each(_transpose))
    return grad_x, grad_a, grad_b.scale(scaling)


def grads(
    spec: AdapterSpec, layer: LayerShape, params: Params, cotangents: Mapping[str, Array], fmt: Format
) -> dict[str, Rounded]:
    """Gradients of every parameter, as in `hora_spec.reference.grads`."""
    exact, result = _exact(params, fmt), {}
    for_a, for_b = {}, {}
    for p, (a, b) in factors(spec, layer, params, fmt).items():
        shape = layer[p]
        dense = Rounded.exact(cotangents[p].reshape(shape.num_heads, shape.head_dim, shape.embed_dim), fmt)
        for_b[p] = (dense @ a.each(_transpose)).scale(spec.scaling)
        if spec.shares_a:
            b, dense = b.each(_join_heads), dense.each(_join_heads)
        for_a[p] = (b.each(_transpose) @ dense).scale(spec.scaling)
    if spec.generates_a:
        result |= _grads_a(spec, exact, for_a)
    elif not spec.trains_a:
        result |= {key: _constant(0.0, value) for key, value in exact.items() if key.partition(".")[0] == "a"}
    elif spec.tie_a:
        result["a"] = total(list(for_a.values()))
    else:
        result |= {f"a.{p}": grad for p, grad in for_a.items()}
    if spec.generates_b:
        result |= _grads_b(spec, layer, exact, for_b)
    if not spec.generates_b:
        result |= {f"b.{p}": grad for p, grad in for_b.items()}
    elif spec.residual:
        result |= {f"b.{p}": _gated(spec, exact, p, grad) for p, grad in for_b.items()}
    if spec.gate is not None:
        result |= {
            f"gate.{p}": (grad * exact[f"b.{p}"]).each(np.ravel).sum(0).each(np.atleast_1d).scale(spec.gain_residual)
            for p, grad in for_b.items()
        }
    return result


def _factor_a(spec: AdapterSpec, params: Mapping[str, Rounded], p: str) -> Rounded:
    if not spec.generates_a:
        return params[name_of_a(spec, p)]
    hidden = _activation(spec.activation, params["a_in"] * params["a_seed"])
    return (params[f"a_out.{p}"] @ hidden).scale(spec.gain_a).each(_transpose)


def _factor_b(spec: AdapterSpec, layer: LayerShape, params: Mapping[str, Rounded], p: str) -> Rounded:
    if not spec.generates_b:
        return params[f"b.{p}"]
    u = params["b_in"] @ _embedding(spec, layer, params, p)[0]
    b = (params[f"b_out.{p}"] @ _activation(spec.activation, u)).scale(spec.gain_b)
    return b + _gated(spec, params, p, params[f"b.{p}"]) if spec.residual else b


def _gated(spec: AdapterSpec, params: Mapping[str, Rounded], p: str, free: Rounded) -> Rounded:
    """The residual, or the gradient of it, weighed by the gate."""
    if spec.gate is None:
        return free
    gate = params[f"gate.{p}"].each(lambda value: np.broadcast_to(value, free.shape))
    return (gate * free).scale(spec.gain_residual)


def _embedding(
    spec: AdapterSpec, layer: LayerShape, params: Mapping[str, Rounded], p: str
) -> tuple[Rounded, Rounded | None]:
    """What enters the hypernetwork, (heads, head_embed, rank), and the standard deviation it was divided by."""
    embed, heads = params["head_embed"], layer[p].num_heads
    mean = embed.each(lambda e: e.reshape(heads, -1, *e.shape[1:])).mean(1)
    if not spec.normalize:
        return mean, None
    centred = mean - mean.mean(1).each(lambda m: m[:, None])
    variance = (centred * centred).mean(1).each(lambda v: v[:, None])
    eps = Rounded.cast(np.full(variance.shape, LAYER_NORM_EPS), centred.format)
    std = (variance + eps).sqrt(LAYER_NORM_EPS / 2)
    return centred / std, std


def _grads_a(spec: AdapterSpec, params: Mapping[str, Rounded], for_a: Mapping[str, Rounded]) -> dict[str, Rounded]:
    u = params["a_in"] * params["a_seed"]
    hidden = _activation(spec.activation, u)
    result, for_hidden = {}, []
    for p, grad in for_a.items():
        result[f"a_out.{p}"] = (hidden @ grad).each(_transpose).scale(spec.gain_a)
        for_hidden.append((grad @ params[f"a_out.{p}"]).each(_transpose).scale(spec.gain_a))
    for_u = total(for_hidden) * _slope(spec.activation, u)
    result["a_in"] = for_u * params["a_seed"]
    result["a_seed"] = (for_u * params["a_in"]).sum(0)
    return result


def _grads_b(
    spec: AdapterSpec, layer: LayerShape, params: Mapping[str, Rounded], for_b: Mapping[str, Rounded]
) -> dict[str, Rounded]:
    result, for_u, inputs, for_embed = {}, [], [], []
    for p, grad in for_b.items():
        z, std = _embedding(spec, layer, params, p)
        u = params["b_in"] @ z
        hidden = _activation(spec.activation, u)
        result[f"b_out.{p}"] = (grad.each(_columns) @ hidden.each(_columns).each(_transpose)).scale(spec.gain_b)
        back = (params[f"b_out.{p}"].each(_transpose) @ grad).scale(spec.gain_b) * _slope(spec.activation, u)
        for_u.append(back.each(_columns))
        inputs.append(z.each(_columns))
        group = layer.group_size(p)
        for_mean = _through_normalization(params["b_in"].each(_transpose) @ back, z, std)
        for_embed.append(for_mean.scale(1 / group).each(lambda e, group=group: np.repeat(e, group, axis=0)))
    result["b_in"] = join(for_u, 1) @ join(inputs, 1).each(_transpose)
    result["head_embed"] = total(for_embed)
    return result


def _through_normalization(grad: Rounded, z: Rounded, std: Rounded | None) -> Rounded:
    if std is None:
        return grad
    along = (grad * z).mean(1).each(lambda m: m[:, None])
    closed = total([grad, _negative(_column_mean(grad)), _negative(z * along)])
    steps = grad - z * along
    return either(closed / std, steps / std - _column_mean(steps / std))


def _activation(name: str, u: Rounded) -> Rounded:
    value = reference.activation(name, u.value)
    lipschitz, sensitive = {"gelu": (1.13, u.magnitude), "sigmoid": (0.25, 1.0)}.get(name, (1.0, np.abs(value)))
    roundings = {"identity": 0, "relu": 0, "leaky_relu": 2 * (u.value <= u.error)}.get(name, LIBRARY_ROUNDINGS)
    return Rounded(value, lipschitz * u.error + roundings * u.format.unit * sensitive, u.format)


def _slope(name: str, u: Rounded) -> Rounded:
    value = reference.activation_slope(name, u.value)
    unit = LIBRARY_ROUNDINGS * u.format.unit
    if name in ("relu", "leaky_relu"):
        jump = 1.0 if name == "relu" else 1 - LEAKY_RELU_SLOPE
        crosses = (np.abs(u.value) <= u.error) & (u.error > 0)
        return Rounded(value, np.where(crosses, jump, u.format.unit * (value != 1) * value), u.format)
    lipschitz, sensitive = {
        "gelu": (0.8, 1 + u.magnitude),
        "sigmoid": (0.1, 1.0),
        "tanh": (0.78, 2.0),
        "identity": (0.0, 0.0),
    }[name]
    return Rounded(value, lipschitz * u.error + unit * sensitive * np.ones_like(value), u.format)


def _update(a: Rounded, b: Rounded, scaling: float) -> Rounded:
    return (b @ a).each(_join_heads).scale(scaling)


def _constant(value: float, like: Rounded) -> Rounded:
    return Rounded.exact(np.full(like.shape, value), like.format)


def _exact(params: Params, fmt: Format) -> dict[str, Rounded]:
    return {key: Rounded.exact(value, fmt) for key, value in params.items()}


def _column_mean(x: Rounded) -> Rounded:
    return x.mean(1).each(lambda mean: np.broadcast_to(mean[:, None], x.shape))


def _negative(x: Rounded) -> Rounded:
    return Rounded(-x.value, x.error, x.format)


def _transpose(array: Array) -> Array:
    return array.swapaxes(-1, -2)


def _join_heads(array: Array) -> Array:
    """``heads head_dim n -> (heads head_dim) n``."""
    return array.reshape(-1, array.shape[-1])


def _heads_last(array: Array) -> Array:
    """``heads tokens head_dim -> tokens (heads head_dim)``."""
    return array.swapaxes(0, 1).reshape(array.shape[1], -1)


def _columns(array: Array) -> Array:
    """``heads n rank -> n (heads rank)``."""
    return array.swapaxes(0, 1).reshape(array.shape[1], -1)
