"""``Backend``: the functions of one implementation, as data, with NumPy arrays going in and out."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hora_spec import reference
from hora_spec.init import init_params
from hora_spec.layout import Layout
from hora_spec.reference import Factors
from hora_spec.shapes import LayerShape
from hora_spec.spec import AdapterSpec

Array = NDArray[Any]
Arrays = dict[str, Array]


class LinearGrads(NamedTuple):
    """Gradients of ``<cotangent, hora_linear(x, ...)>`` with respect to its trainable inputs.

    ``x`` (..., embed); ``a`` and ``b`` shaped like the factors.
    """

    x: Array
    a: Array
    b: Array


class Backend(NamedTuple):
    """One implementation under test: callables with the names and argument order of `hora_spec.reference`.

    A wrapper converts NumPy arrays to the framework's, computes in the dtype it is given (float32 in, float32
    arithmetic), and converts back. Routes and compilation are further backends: ``backend._replace(name=..., ...)``.

    Attributes
    ----------
    name
        For messages, such as ``"torch merge-forward"``.
    init_params
        ``(spec, layer, seed, name) -> {canonical name: float32 array}``.
    factors
        ``(spec, layer, params) -> {projection: Factors}``.
    delta
        ``(spec, layer, params) -> {projection: (heads * head_dim, embed)}``.
    hora_linear
        ``(x, weight, bias, factors, scaling) -> (..., heads * head_dim)``. With a 16-bit `x` the factors arrive in
        float32.
    linear_grads
        ``(x, weight, bias, factors, scaling, cotangent) -> LinearGrads``, through the backend's own backward pass.
    merge
        ``(weight, delta, layout) -> array`` like `weight`, which stays as it was.
    grads
        ``(spec, layer, params, cotangents) -> {canonical name: array}``: gradients of
        ``sum_p <cotangents_p, delta_p>``, through the backend's own differentiation.
    """

    name: str
    init_params: Callable[[AdapterSpec, LayerShape, int, str], Arrays]
    factors: Callable[[AdapterSpec, LayerShape, Mapping[str, Array]], dict[str, Factors]]
    delta: Callable[[AdapterSpec, LayerShape, Mapping[str, Array]], Arrays]
    hora_linear: Callable[[Array, Array, Array | None, Factors, float], Array]
    linear_grads: Callable[[Array, Array, Array | None, Factors, float, Array], LinearGrads]
    merge: Callable[[Array, Array, Layout], Array]
    grads: Callable[[AdapterSpec, LayerShape, Mapping[str, Array], Mapping[str, Array]], Arrays]


def _linear_grads(
    x: Array, weight: Array, bias: Array | None, factors: Factors, scaling: float, cotangent: Array
) -> LinearGrads:
    """Backward pass of `hora_spec.reference.hora_linear`, head by head, by hand."""
    weight, a, b = (np.asarray(part, np.float64) for part in (weight, *factors))
    heads, head_dim, _ = b.shape
    tokens = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    rows = np.asarray(cotangent, np.float64).reshape(len(tokens), heads, head_dim)
    grad_x, grad_a, grad_b = np.zeros(tokens.shape), np.zeros(a.shape), np.zeros(b.shape)
    for i in range(heads):
        a_i = a if a.ndim == 2 else a[i]
        grad_x += rows[:, i] @ (weight[i * head_dim : (i + 1) * head_dim] + scaling * b[i] @ a_i)
        grad_weight = scaling * rows[:, i].T @ tokens
        grad_b[i] = grad_weight @ a_i.T
        if a.ndim == 2:
            grad_a += b[i].T @ grad_weight
        else:
            grad_a[i] = b[i].T @ grad_weight
    return LinearGrads(grad_x.reshape(x.shape), grad_a, grad_b)


REFERENCE = Backend(
    name="reference",
    init_params=init_params,
    factors=reference.factors,
    delta=reference.delta,
    hora_linear=reference.hora_linear,
    linear_grads=_linear_grads,
    merge=reference.merge,
    grads=reference.grads,
)
"""`hora_spec.reference` as a backend: what every check compares with."""
