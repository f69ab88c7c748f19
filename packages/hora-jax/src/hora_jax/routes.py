"""Two ways through an adapted weight, with derivative rules that never form a dense gradient.

A `Form` writes every contraction once, for a weight stored in any order of axes. The factors are cast to x's dtype,
never x to theirs. ``u = x A^T`` accumulates in float32 and is rounded to x's dtype; gradients of the factors
accumulate in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from hora_spec import HoraError
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

Route = Literal["auto", "branch", "merge", "plain"]


def check(route: str) -> None:
    """Raise unless `route` is one of ours."""
    if route not in get_args(Route):
        raise HoraError(f"route must be one of {', '.join(get_args(Route))}, got {route!r} (spec D3)")


def merges(route: Route, x: Array, weight: Array) -> bool:
    """Whether the merge route is taken: never in 16 bits, where W + delta rounds small deltas away (spec D3)."""
    if route in ("branch", "plain") or x.dtype != weight.dtype or x.dtype not in (jnp.float32, jnp.float64):
        return False
    return route == "merge" or (x.dtype == jnp.float32 and x.size > x.shape[-1] ** 2)


@dataclass(frozen=True)
class Form:
    """The contractions of one weight, by letters of its axes.

    Parameters
    ----------
    weight
        Letters in stored order: d embed; o heads and head_dim joined, or h heads and k head_dim; g groups of heads; any
        other letter is an axis of several maps that leads the output, as in the einsum ``...d,chdk->c...hk``.
    a
        Letters of A: ``"rd"``, or ``"hrd"`` when each head has its own.
    """

    weight: str
    a: str = "rd"

    @cached_property
    def maps(self) -> str:
        """Letters of the axes that lead the output."""
        return "".join(letter for letter in self.weight if letter not in "dgohk")

    @cached_property
    def rows(self) -> str:
        """Letters of groups, heads and head_dim, in the output's order."""
        return "".join(letter for letter in "gohk" if letter in self.weight)

    @cached_property
    def b(self) -> str:
        """Letters of B."""
        return f"{self.maps}{self.rows}r"

    @cached_property
    def y(self) -> str:
        """Letters of the output, ``...`` for those of the batch."""
        return f"{self.maps}...{self.rows}"

    def contract(self, *operands: str, to: str) -> str:
        """Subscripts of an einsum; an operand is x, u, y, a, b, weight."""
        letters = {"x": "...d", "u": f"...{self.a[:-1]}", "y": self.y, "a": self.a, "b": self.b, "weight": self.weight}
        return f"{','.join(letters[name] for name in operands)}->{letters[to]}"

    def output_shape(self, x: Array, b: Array) -> tuple[int, ...]:
        """Shape of the output for these inputs."""
        maps = len(self.maps)
        return (*b.shape[:maps], *x.shape[:-1], *b.shape[maps:-1])


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


def follow(form: Form, a: Array, b: Array, like: Array, letters: str) -> tuple[Array, Array]:
    """Factors sharded as an array with these letters, A whole on every device unless free per head.

    On a mesh of explicit axes alone: where axes are automatic, the compiler propagates the weight's sharding by itself.
    """
    sharding = explicit(like)
    if sharding is None:
        return a, b
    named = letters.replace("...", " " * (like.ndim - len(letters.replace("...", ""))))
    axes = dict(zip(named, sharding.spec, strict=True))
    axes.setdefault("h", axes.get("o"))  # joined with head_dim, heads lead
    specs = [PartitionSpec(*(axes.get(x) if x in "ohk" else None for x in name)) for name in (form.a, form.b)]
    return jax.sharding.reshard(a, specs[0]), jax.sharding.reshard(b, specs[1])


def plain(form: Form, x: Array, a: Array, b: Array) -> Array:
    """``(x A^T) B^T`` by JAX's own derivative rules."""
    return _branch_forward(form, x, a, b)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _branch(form: Form, x: Array, a: Array, b: Array) -> Array:
    return plain(form, x, a, b)


def _branch_forward(form: Form, x: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    u = _shrink(form, x, a)
    return jnp.einsum(form.contract("u", "b", to="y"), u, b.astype(x.dtype)), (x, u, a, b)


def _branch_backward(form: Form, saved: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    return _low_rank_gradients(form, *saved, g)


_branch.defvjp(_branch_forward, _branch_backward)
branch = reverse_only(_branch)


def merged(form: Form, weight: Array, a: Array, b: Array) -> Array:
    """``W + delta`` in the form and dtype of the weight, a constant to differentiation; `through` has its gradients."""
    delta = jnp.einsum(form.contract("b", "a", to="weight"), b, a, out_sharding=explicit(weight))
    return jax.lax.stop_gradient((weight + delta).astype(weight.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through(form: Form, y: Array, x: Array, weight: Array, a: Array, b: Array) -> Array:
    return y


def _through_forward(
    form: Form, y: Array, x: Array, weight: Array, a: Array, b: Array
) -> tuple[Array, tuple[Array, ...]]:
    return y, (x, weight, a, b)


def _through_backward(form: Form, saved: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    x, weight, a, b = saved
    narrow = g.astype(x.dtype)
    grad_x, grad_a, grad_b = _low_rank_gradients(form, x, _shrink(form, x, a), a, b, narrow)
    through_base = jnp.einsum(form.contract("y", "weight", to="x"), narrow, weight, out_sharding=explicit(x))
    return g, through_base + grad_x, None, grad_a, grad_b


_through.defvjp(_through_forward, _through_backward)
through = reverse_only(_through)
through.__doc__ = """y, which is ``x (W + delta)^T`` by `merged`, with the gradients of x, A and B; W is constant."""


def _shrink(form: Form, x: Array, a: Array) -> Array:
    return _accumulate(form.contract("x", "a", to="u"), x, a.astype(x.dtype)).astype(x.dtype)


def _low_rank_gradients(form: Form, x: Array, u: Array, a: Array, b: Array, g: Array) -> tuple[Array, Array, Array]:
    """Gradients of ``(x A^T) B^T`` with respect to x, A and B, given that of its result."""
    grad_b = _accumulate(form.contract("y", "u", to="b"), g, u, like=b)
    grad_u = _accumulate(form.contract("y", "b", to="u"), g, b.astype(g.dtype), like=u).astype(g.dtype)
    grad_a = _accumulate(form.contract("u", "x", to="a"), grad_u, x, like=a)
    grad_x = jnp.einsum(form.contract("u", "a", to="x"), grad_u, a.astype(x.dtype), out_sharding=explicit(x))
    return grad_x, grad_a.astype(a.dtype), grad_b.astype(b.dtype)


def _accumulate(subscripts: str, *operands: Array, like: Array | None = None) -> Array:
    """Contraction that accumulates in float32 or better, sharded like another array."""
    wide = jnp.promote_types(operands[0].dtype, jnp.float32)
    out = None if like is None else explicit(like)
    return jnp.einsum(subscripts, *operands, preferred_element_type=wide, out_sharding=out)


def explicit(array: Array) -> NamedSharding | None:
    """The sharding that is part of an array's type, None where the compiler decides."""
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None
