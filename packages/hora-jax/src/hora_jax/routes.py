"""Two ways through an adapted projection, with derivative rules that never form a dense gradient.

Shapes: x (..., d), weight ((h k), d), a (r, d) and b (o, r) with o = (h k), or (h, r, d) and (h, k, r) when A is free
per head; b is scaled already; ``u = x A^T``. The factors are cast to x's dtype, never x to theirs. u accumulates in
float32 and is rounded to x's dtype; gradients of the factors accumulate in float32.
"""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import jax
import jax.numpy as jnp
from hora_spec import Factors, HoraError
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array


def reverse_only(function: Callable[..., Array]) -> Callable[..., Array]:
    """Turn JAX's refusal of forward mode under a custom rule into an error that says what to do."""

    @wraps(function)
    def guarded(*args: Array) -> Array:
        try:
            return function(*args)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise HoraError(
                "forward-mode differentiation needs JAX's own derivative rules, got a route with custom low-rank ones: "
                'pass route="plain" (spec D3)'
            ) from error

    return guarded


def follow(factors: Factors, heads: Array, axis: int) -> Factors:
    """Factors sharded as the output they add to: A on every device, B by heads; on a mesh of explicit axes alone.

    `axis` is the axis of `heads` that the heads lead, -1 when they are joined with head_dim. Where axes are automatic,
    the compiler propagates the weight's sharding by itself.
    """
    a, b = factors
    sharding = _explicit(heads)
    if sharding is None:
        return factors
    by_head = sharding.spec[axis]
    a = jax.sharding.reshard(a, PartitionSpec(*((by_head, None, None) if a.ndim == 3 else (None, None))))
    return Factors(a, jax.sharding.reshard(b, PartitionSpec(by_head, None, None)))


def plain(x: Array, a: Array, b: Array) -> Array:
    """``(x A^T) B^T``, (..., o) or (..., h, k), by JAX's own derivative rules."""
    return _branch_forward(x, a, b)[0]


@jax.custom_vjp
def _branch(x: Array, a: Array, b: Array) -> Array:
    return plain(x, a, b)


def _branch_forward(x: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    u = _shrink(x, a)
    return jnp.einsum(_contractions(a).expand, u, b.astype(x.dtype)), (x, u, a, b)


def _branch_backward(saved: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    return _low_rank_gradients(*saved, g)


_branch.defvjp(_branch_forward, _branch_backward)
branch = reverse_only(_branch)


@jax.custom_vjp
def _merged(x: Array, weight: Array, a: Array, b: Array) -> Array:
    wide = jnp.promote_types(weight.dtype, jnp.float32)
    delta = jnp.einsum("hkr,hrd->hkd" if a.ndim == 3 else "or,rd->od", b, a).reshape(weight.shape)
    if (sharding := _explicit(weight)) is not None:
        delta = jax.sharding.reshard(delta, sharding)
    return x @ (weight.astype(wide) + delta).astype(weight.dtype).T


def _merged_forward(x: Array, weight: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    return _merged(x, weight, a, b), (x, weight, a, b)  # the sum itself is not saved


def _merged_backward(saved: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    x, weight, a, b = saved
    rows = g.astype(x.dtype).reshape(*g.shape[:-1], *b.shape[:-1])
    grad_x, grad_a, grad_b = _low_rank_gradients(x, _shrink(x, a), a, b, rows)
    through_base = jnp.einsum("...o,od->...d", g, weight, out_sharding=_explicit(x))
    return through_base.astype(x.dtype) + grad_x, None, grad_a, grad_b


_merged.defvjp(_merged_forward, _merged_backward)
merged = reverse_only(_merged)


class _Contractions(NamedTuple):
    """The einsums of a branch, forward and backward."""

    shrink: str  # x, a -> u
    expand: str  # u, b -> z
    to_b: str  # g, u -> gradient of b
    to_u: str  # g, b
    to_a: str  # gradient of u, x
    to_x: str  # gradient of u, a


_SHARED = _Contractions(
    "...d,rd->...r", "...r,or->...o", "...o,...r->or", "...o,or->...r", "...r,...d->rd", "...r,rd->...d"
)
_PER_HEAD = _Contractions(
    "...d,hrd->...hr", "...hr,hkr->...hk", "...hk,...hr->hkr", "...hk,hkr->...hr", "...hr,...d->hrd", "...hr,hrd->...d"
)


def _contractions(a: Array) -> _Contractions:
    return _PER_HEAD if a.ndim == 3 else _SHARED


def _shrink(x: Array, a: Array) -> Array:
    return _accumulate(_contractions(a).shrink, x, a.astype(x.dtype)).astype(x.dtype)


def _low_rank_gradients(x: Array, u: Array, a: Array, b: Array, g: Array) -> tuple[Array, Array, Array]:
    """Gradients of ``(x A^T) B^T`` with respect to x, A and B, given that of its result."""
    of = _contractions(a)
    grad_b = _accumulate(of.to_b, g, u, like=b)
    grad_u = _accumulate(of.to_u, g, b.astype(g.dtype), like=u).astype(g.dtype)
    grad_a = _accumulate(of.to_a, grad_u, x, like=a)
    grad_x = jnp.einsum(of.to_x, grad_u, a.astype(x.dtype), out_sharding=_explicit(x))
    return grad_x, grad_a.astype(a.dtype), grad_b.astype(b.dtype)


def _accumulate(subscripts: str, *operands: Array, like: Array | None = None) -> Array:
    """Contraction that accumulates in float32 or better, sharded like another array."""
    wide = jnp.promote_types(operands[0].dtype, jnp.float32)
    out = None if like is None else _explicit(like)
    return jnp.einsum(subscripts, *operands, preferred_element_type=wide, out_sharding=out)


def _explicit(array: Array) -> NamedSharding | None:
    """The sharding that is part of an array's type, None where the compiler decides."""
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None
