"""The method in JAX: factors, delta and the adapted projection, batched over heads and stacked layers.

Functions take the canonical parameters of one layer, or of several equal layers stacked on a leading axis; one einsum
serves both. Letters: h heads, g heads of a group, k head_dim, d embed, r rank, m hidden, e head_embed.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from hora_spec import (
    LAYER_NORM_EPS,
    LEAKY_RELU_SLOPE,
    AdapterSpec,
    Factors,
    HoraError,
    LayerShape,
    Layout,
    name_of_a,
    param_shapes,
)
from jaxtyping import Array, Float

from hora_jax import routes
from hora_jax.routes import Route

Params = Mapping[str, Array]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    # jax.nn.leaky_relu has slope 1 at zero, the spec the slope for negative input (spec G3)
    "leaky_relu": lambda u: jnp.where(u > 0, u, LEAKY_RELU_SLOPE * u),
    "relu": jax.nn.relu,
    "gelu": lambda u: jax.nn.gelu(u, approximate=False),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "identity": lambda u: u,
}


def factors(spec: AdapterSpec, layer: LayerShape, params: Params) -> dict[str, Factors]:
    """Factors of every projection: ``B = g_B W_2 s(W_1 LN(E)) + residual`` for all heads at once, and A.

    Parameters
    ----------
    spec, layer
        Method and shapes.
    params
        Canonical name to array (spec S6); all of them may carry the same leading axes, such as layers.

    Returns
    -------
    dict
        Projection to ``Factors(a, b)``: a (..., rank, embed), or (..., heads, rank, embed) when free per head, and
        b (..., heads, head_dim, rank), in the dtype of the parameters.

    Raises
    ------
    HoraError
        If names or shapes do not fit.

    Notes
    -----
    Paper section 4, spec G1 to G6. Contractions run at the highest precision; they are small.
    """
    _check_shapes(spec, layer, params)
    hidden = _hidden_b(spec, layer, params)
    return {
        p: Factors(_factor_a(spec, params, p), _factor_b(spec, params, p, hidden.get(layer.group_size(p))))
        for p in layer
    }


def delta(
    spec: AdapterSpec, layer: LayerShape, params: Params
) -> dict[str, Float[Array, "*layers heads*head_dim embed"]]:
    """Dense update of every projection, ``scaling * stack_i(B_i) A``; row ``i * head_dim + j`` is row j of head i.

    Parameters
    ----------
    spec, layer, params
        As for `factors`.

    Returns
    -------
    dict
        Projection to array (..., heads * head_dim, embed).

    Notes
    -----
    For merging and inspection; training uses `hora_linear`, which has it at most in a sum with the weight (spec D1).
    """
    return {p: dense(f, spec.scaling) for p, f in factors(spec, layer, params).items()}


def dense(factors: Factors, scaling: float) -> Float[Array, "*layers heads*head_dim embed"]:
    """``scaling * stack_i(B_i) A`` of one projection, heads and head_dim joined."""
    a, b = factors
    product = _einsum("...hkr,...hrd->...hkd" if a.ndim == b.ndim else "...hkr,...rd->...hkd", scaling * b, a)
    return product.reshape(*b.shape[:-3], -1, a.shape[-1])


def merge(weight: Array, delta: Array, layout: Layout) -> Array:
    """Stored weight with `delta` added in its window, summed in float32 or better and rounded once.

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
    array
        Of weight's shape and dtype.

    Notes
    -----
    Spec M1. `hora_jax.merge` also refuses what rule M3 refuses; under a trace, values are unknown.
    """
    if not isinstance(layout, Layout) or jnp.ndim(weight) != len(layout.axes):
        raise HoraError(f"a weight has the axes of its layout, got {jnp.shape(weight)} for {layout!r:.80} (spec L3)")
    sizes = dict(zip(layout.axes, layout.window_shape(weight.shape), strict=True))
    rows = prod(sizes[axis] for axis in layout.row_axes)
    expected = (sizes["l"], rows, sizes["d"]) if layout.stacked else (rows, sizes["d"])
    if jnp.shape(delta) != expected:
        raise HoraError(f"a delta is canonical, {expected} here, got shape {jnp.shape(delta)} (spec M1)")
    wide, index = jnp.promote_types(weight.dtype, jnp.float32), layout.index(weight.shape)
    total = weight[index].astype(wide) + layout.write(delta, weight.shape).astype(wide)
    return weight.at[index].set(total.astype(weight.dtype)) if layout.window else total.astype(weight.dtype)


def hora_linear(
    x: Float[Array, "*batch embed"],
    weight: Float[Array, "heads*head_dim embed"],
    bias: Float[Array, "heads*head_dim"] | None,
    factors: Factors,
    scaling: float,
    *,
    route: Route = "auto",
) -> Float[Array, "*batch heads*head_dim"]:
    """Adapted projection ``x (W + delta)^T + bias``; no dense gradient is ever formed.

    Parameters
    ----------
    x
        Activations.
    weight
        Frozen weight in canonical form. It is a constant: its gradient is zero by definition, on every route.
    bias
        May be trained.
    factors, scaling
        The projection's factors and ``spec.scaling``.
    route
        ``"branch"``: ``x W^T + (x A^T) B^T``. ``"merge"``: ``x (W + delta)^T`` forward, low-rank gradients backward;
        what is saved for them is x, W and the factors, never the sum. ``"plain"``: the branch by JAX's own rules, the
        route that supports forward mode. ``"auto"``: merge for float32 with more tokens than embed, else branch.

    Returns
    -------
    array
        (..., heads * head_dim) in the dtype of ``x @ weight.T``.

    Raises
    ------
    HoraError
        If shapes do not fit, the route is unknown, or forward mode meets a route without it.

    Notes
    -----
    Spec D3. Factors are cast to x's dtype, never x to theirs; ``x A^T`` accumulates in float32 and is rounded to x's
    dtype; gradients of factors accumulate in float32.
    """
    a, b = factors
    if weight.shape != (b.shape[0] * b.shape[1], x.shape[-1]) or a.shape[-2:] != (b.shape[-1], x.shape[-1]):
        raise HoraError(
            "x (..., embed), weight (heads * head_dim, embed), a (rank, embed) and b (heads, head_dim, rank) must fit, "
            f"got {x.shape}, {weight.shape}, {a.shape} and {b.shape}: transpose Flax kernels first (spec D3)"
        )
    routes.check(route)
    c, a, b, rows = _contraction(x, weight, factors, scaling)
    y = routes.product(route, c, partial(_multiply, c), x, jax.lax.stop_gradient(rows), a, b)
    y = y.reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def _contraction(
    x: Array, weight: Array, factors: Factors, scaling: float
) -> tuple[routes.Contraction, *tuple[Array, ...]]:
    """How x meets the factors, A, ``scaling * B``, and the weight: rows joined, unless A is free per head."""
    a, b = factors.a, scaling * factors.b
    batch = "".join(chr(ord("A") + i) for i in range(x.ndim - 1))
    if a.ndim == b.ndim:
        c = routes.Contraction(f"{batch}d", "hkd", "hrd", "hkr", f"{batch}hk")
        return c, a, b, weight.reshape(*b.shape[:2], -1)
    return routes.Contraction(f"{batch}d", "od", "rd", "or", f"{batch}o"), a, b.reshape(-1, b.shape[-1]), weight


def _multiply(c: routes.Contraction, x: Array, weight: Array) -> Array:
    return jnp.einsum(c.to("y", "x", "weight"), x, weight)


def _check_shapes(spec: AdapterSpec, layer: LayerShape, params: Params) -> None:
    expected = param_shapes(spec, layer)
    if expected.keys() != params.keys():
        raise HoraError(f"parameters must be exactly {list(expected)}, got {list(params)} (spec S7)")
    leading = {jnp.shape(params[key])[: jnp.ndim(params[key]) - len(shape)] for key, shape in expected.items()}
    for key, shape in expected.items():
        got = jnp.shape(params[key])
        if len(leading) > 1 or got[len(got) - len(shape) :] != shape:
            raise HoraError(
                f"{key} must have shape {shape}, after leading axes that all parameters share, got {got} (spec S6)"
            )


def _hidden_b(spec: AdapterSpec, layer: LayerShape, params: Params) -> dict[int, Array]:
    """``s(W_1 LN(E))``, (..., heads, hidden, rank), for every group size (spec G1 to G3).

    Sizes are contracted apart: XLA compiles one contraction that is split afterwards three times as long.
    """
    if not spec.generates_b:
        return {}
    return {size: _hidden(spec, params, size) for size in {layer.group_size(p) for p in layer}}


def _hidden(spec: AdapterSpec, params: Params, group: int) -> Array:
    embed = params["head_embed"]
    if group > 1:
        embed = embed.reshape(*embed.shape[:-3], -1, group, *embed.shape[-2:]).mean(axis=-3)
    if spec.normalize:
        embed = embed - embed.mean(axis=-2, keepdims=True)
        embed = embed * jax.lax.rsqrt((embed**2).mean(axis=-2, keepdims=True) + LAYER_NORM_EPS)
    return _ACTIVATIONS[spec.activation](_einsum("...me,...her->...hmr", params["b_in"], embed))


def _factor_b(spec: AdapterSpec, params: Params, p: str, hidden: Array | None) -> Array:
    if hidden is None:
        return params[f"b.{p}"]
    b = spec.gain_b * _einsum("...km,...hmr->...hkr", params[f"b_out.{p}"], hidden)
    if not spec.residual:
        return b
    free = params[f"b.{p}"]
    return b + free if spec.gate is None else b + spec.gain_residual * params[f"gate.{p}"][..., None, None] * free


def _factor_a(spec: AdapterSpec, params: Params, p: str) -> Array:
    if not spec.generates_a:
        a = params[name_of_a(spec, p)]
        return a if spec.trains_a else jax.lax.stop_gradient(a)
    hidden = _ACTIVATIONS[spec.activation](params["a_in"] * params["a_seed"][..., None, :])
    return spec.gain_a * _einsum("...dm,...mr->...rd", params[f"a_out.{p}"], hidden)


def _einsum(subscripts: str, *operands: Array) -> Array:
    return jnp.einsum(subscripts, *operands, precision="highest")
