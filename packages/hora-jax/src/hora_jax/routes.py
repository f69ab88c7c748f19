"""Two ways through an adapted weight, with derivative rules that never form a dense gradient.

A `Contraction` writes every product once, for a weight and an input whose axes stand in any order. The factors are cast
to x's dtype, never x to theirs. The first product, ``u = x A^T`` where A reads what is contracted, accumulates in
float32 and is rounded to x's dtype; gradients of the factors accumulate in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from hora_spec import HoraError
from jax.extend.core import InconclusiveDimensionOperation
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

Route = Literal["auto", "branch", "merge", "plain"]
"""Ways through an adapted weight that a caller may choose."""

Way = Literal[Route, "observe"]
"""One more is for measurements, see `observe`."""


Drop = Callable[[Array, Array], tuple[Array, Array]]
"""What dropout makes of a branch's input and of its second factor."""


def check(route: str) -> None:
    """Raise unless `route` is one of ours."""
    if not isinstance(route, str) or route not in get_args(Route):
        raise HoraError(f"route must be one of {', '.join(get_args(Route))}, got {route!r} (spec D3)")


@dataclass(frozen=True)
class Contraction:
    """The product ``y = x W`` for ``W = sum_r first * second``, by one letter for each axis.

    Parameters
    ----------
    x, weight, y
        Letters of input, weight and output. A letter of x and the weight that y lacks is contracted.
    first
        Letters of the factor that meets x: it has a contracted letter, and ``r``.
    second
        Letters of the other factor, and ``r``.
    precision
        Of every product, as `jax.lax.dot_general` takes it.
    """

    x: str
    weight: str
    first: str
    second: str
    y: str
    precision: Any = None

    @property
    def u(self) -> str:
        """Letters of the product of x and the first factor."""
        return "".join(c for c in dict.fromkeys(self.x + self.first) if c in self.y + self.second)

    def to(self, result: str, *operands: str) -> str:
        """Subscripts of an einsum among x, weight, first, second, u and y."""
        return f"{','.join(getattr(self, name) for name in operands)}->{getattr(self, result)}"


def merges(route: Way, contraction: Contraction, x: Array, weight: Array) -> bool:
    """Whether the merge route is taken: never in 16 bits, where W + delta rounds small deltas away (spec D3).

    ``auto`` merges float32 when tokens outnumber the contracted width; where a symbolic size cannot tell, it does not.
    """
    if route in ("branch", "plain", "observe") or x.dtype != weight.dtype or x.dtype not in (jnp.float32, jnp.float64):
        return False
    width = 1
    for letter, size in zip(contraction.weight, weight.shape, strict=True):
        width *= size if letter not in contraction.y else 1
    try:
        return route == "merge" or (x.dtype == jnp.float32 and bool(x.size > width**2))
    except InconclusiveDimensionOperation:
        return False


def reverse_only(function: Callable[..., Array]) -> Callable[..., Array]:
    """Turn JAX's refusal of forward mode under a custom rule into an error that says what to do."""

    @wraps(function)
    def guarded(*args: object) -> Array:
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


def varying(array: Array) -> frozenset[str]:
    """Mesh axes of the surrounding `jax.shard_map` over which an array's values differ."""
    kind = jax.typeof(array)
    return getattr(kind, "vma", None) or getattr(getattr(kind, "manual_axis_type", None), "varying", frozenset())


def aligned(*arrays: Array) -> tuple[Array, ...]:
    """The arrays, all varying over the union of their axes: a custom rule then returns gradients of its inputs' types.

    Outside `jax.shard_map`, and where it checks nothing, the arrays themselves.
    """
    union = frozenset().union(*map(varying, arrays))
    missing = [tuple(sorted(union - varying(array))) for array in arrays]
    return tuple(
        jax.lax.pcast(array, axes, to="varying") if axes else array for array, axes in zip(arrays, missing, strict=True)
    )


def follow(c: Contraction, first: Array, second: Array, like: Array, letters: str) -> tuple[Array, Array]:
    """Factors sharded as an array with these letters, whole on every device along what is contracted.

    On a mesh of explicit axes alone: where axes are automatic, the compiler propagates the weight's sharding by itself.
    """
    sharding = explicit(like)
    if sharding is None:
        return first, second
    axes = dict(zip(letters, sharding.spec, strict=True))
    specs = [PartitionSpec(*(axes.get(x) if x in c.y else None for x in names)) for names in (c.first, c.second)]
    return jax.sharding.reshard(first, specs[0]), jax.sharding.reshard(second, specs[1])


def product(
    route: Way,
    c: Contraction,
    base: Callable[[Array, Array], Array],
    x: Array,
    weight: Array,
    a: Array,
    b: Array,
    *,
    constant: bool = True,
    drop: Drop | None = None,
) -> Array:
    """``x (W + delta)`` by a route, given how the base multiplies.

    Parameters
    ----------
    route, c
        How; the letters of what follows.
    base
        ``base(x, weight)``, which may keep axes of length one that `c` does not name.
    x, weight, a, b
        Input, weight, first and second factor.
    constant
        Whether the weight is frozen. Where it is made of trained values, too, a branch leaves them their gradients.
    drop
        What dropout makes of the branch's input and second factor. There is a branch then, whatever the route.
    """
    if drop is None and constant and merges(route, c, x, weight):
        a, b = follow(c, a, b, weight, c.weight)
        y = base(jax.lax.stop_gradient(x), merged(c, weight, a, b))
        return through(c, y, *aligned(x, jax.lax.stop_gradient(weight), a, b))
    y = base(x, weight)
    if drop is not None:
        x, b = drop(x, b)
    a, b = follow(c, a, b, y, c.y)
    way = {"plain": plain, "observe": observe}.get(route, branch)
    return y + way(c, y.dtype, *aligned(x, a, b))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def observe(c: Contraction, dtype: Any, x: Array, a: Array, b: Array) -> Array:
    """The product with both factors, whose gradients are what it sees instead, whatever the cotangent.

    That of the first factor is ``u^T x``, its Gram product with the inputs; that of the second ``sum x^2`` everywhere.
    """
    return plain(c, dtype, x, a, b)


def _observe_backward(c: Contraction, dtype: Any, saved: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    x, u, a, b = saved
    seen = _accumulate(c, "first", "u", "x", u, x, like=a)
    square = jnp.square(x.astype(seen.dtype)).sum()
    return jnp.zeros_like(x), seen.astype(a.dtype), jnp.full_like(b, square)


def plain(c: Contraction, dtype: Any, x: Array, a: Array, b: Array) -> Array:
    """The product with both factors, by JAX's own derivative rules."""
    return _branch_forward(c, dtype, x, a, b)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _branch(c: Contraction, dtype: Any, x: Array, a: Array, b: Array) -> Array:
    return plain(c, dtype, x, a, b)


def _branch_forward(c: Contraction, dtype: Any, x: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    u = _shrink(c, x, a)
    y = _einsum(c, "y", "u", "second", u, b.astype(x.dtype), preferred_element_type=dtype)
    return y.astype(dtype), (x, u, a, b)


def _branch_backward(c: Contraction, dtype: Any, saved: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    return _low_rank_gradients(c, *saved, g.astype(saved[0].dtype))


_branch.defvjp(_branch_forward, _branch_backward)
observe.defvjp(_branch_forward, _observe_backward)
branch = reverse_only(_branch)


def merged(c: Contraction, weight: Array, a: Array, b: Array) -> Array:
    """``W + delta`` in the form and dtype of the weight, a constant to differentiation; `through` has its gradients."""
    delta = _einsum(c, "weight", "second", "first", b, a, out_sharding=explicit(weight))
    return jax.lax.stop_gradient((weight + delta).astype(weight.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through(c: Contraction, y: Array, x: Array, weight: Array, a: Array, b: Array) -> Array:
    return y


def _through_forward(
    c: Contraction, y: Array, x: Array, weight: Array, a: Array, b: Array
) -> tuple[Array, tuple[Array, ...]]:
    return y, (x, weight, a, b)


def _through_backward(c: Contraction, saved: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    x, weight, a, b = saved
    narrow = g.astype(x.dtype)
    grad_x, grad_a, grad_b = _low_rank_gradients(c, x, _shrink(c, x, a), a, b, narrow)
    through_base = _einsum(c, "x", "y", "weight", narrow, weight, out_sharding=explicit(x))
    return g, through_base + grad_x, None, grad_a, grad_b


_through.defvjp(_through_forward, _through_backward)
through = reverse_only(_through)
through.__doc__ = (
    """y, which is ``x (W + delta)`` by `merged`, with the gradients of x and the factors; W is constant."""
)


def _shrink(c: Contraction, x: Array, a: Array) -> Array:
    return _accumulate(c, "u", "x", "first", x, a.astype(x.dtype)).astype(x.dtype)


def _low_rank_gradients(c: Contraction, x: Array, u: Array, a: Array, b: Array, g: Array) -> tuple[Array, ...]:
    """Gradients of the product with both factors with respect to x, a and b, given that of its result."""
    grad_b = _accumulate(c, "second", "y", "u", g, u, like=b)
    grad_u = _accumulate(c, "u", "y", "second", g, b.astype(g.dtype), like=u).astype(g.dtype)
    grad_a = _accumulate(c, "first", "u", "x", grad_u, x, like=a)
    grad_x = _einsum(c, "x", "u", "first", grad_u, a.astype(x.dtype), out_sharding=explicit(x))
    return grad_x, grad_a.astype(a.dtype), grad_b.astype(b.dtype)


def _accumulate(c: Contraction, to: str, one: str, two: str, *operands: Array, like: Array | None = None) -> Array:
    """Product that accumulates in float32 or better, sharded like another array."""
    wide = jnp.promote_types(operands[0].dtype, jnp.float32)
    out = None if like is None else explicit(like)
    return _einsum(c, to, one, two, *operands, preferred_element_type=wide, out_sharding=out)


def _einsum(c: Contraction, to: str, one: str, two: str, *operands: Array, **options: Any) -> Array:
    return jnp.einsum(c.to(to, one, two), *operands, precision=c.precision, **options)


def explicit(array: Array) -> NamedSharding | None:
    """The sharding that is part of an array's type, None where the compiler decides."""
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None
