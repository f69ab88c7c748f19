"""A product with a planned weight, as the base's product and a contraction with both factors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jaxtyping import Array

from hora_jax.routes import Contraction, Drop, Way, product
from hora_jax.views import View

_WEIGHT, _INPUT = "abcdefghijklmnopq", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def multiply(eqn: JaxprEqn, lhs: Any, rhs: Any, route: Way, drop: Drop | None) -> Array | None:
    """The result of a ``dot_general`` one of whose operands is a view; None where no factor meets the other operand."""
    view, x = (lhs, rhs) if isinstance(lhs, View) else (rhs, lhs)
    if not all(jnp.issubdtype(v.dtype, jnp.floating) for v in (view.w, x)) or x.dtype.itemsize < 2:
        return None  # factors are cast to x's dtype, and 8 bits are too few for them
    letters = _letters(eqn, view, x, isinstance(lhs, View))
    gone = {letter for letter, size in zip(letters.weight, view.w.shape, strict=True) if size == 1}
    contraction = _contraction(eqn, view, letters, gone)
    if contraction is None:
        return None
    c, a, b = contraction

    def base(x: Array, weight: Array) -> Array:
        pair = _restored(x, letters.x, gone), _restored(weight, letters.weight, gone)
        return _squeezed(eqn.primitive.bind(*(pair if view is rhs else pair[::-1]), **eqn.params), letters.y, gone)

    x, weight = _squeezed(x, letters.x, gone), _squeezed(view.w, letters.weight, gone)
    y = product(route, c, base, x, weight, a, b, constant=view.constant, drop=drop)
    return _restored(y, letters.y, gone)


@dataclass(frozen=True)
class _Letters:
    x: str
    weight: str
    y: str


def _letters(eqn: JaxprEqn, view: View, x: Array, left: bool) -> _Letters:
    contracted, batch = eqn.params["dimension_numbers"]
    (of_w, of_x), (batch_w, batch_x) = (contracted, batch) if left else (contracted[::-1], batch[::-1])
    weight = list(_WEIGHT[: view.w.ndim])
    inputs = list(_INPUT[: x.ndim])
    for i, j in zip((*of_w, *batch_w), (*of_x, *batch_x), strict=True):
        inputs[j] = weight[i]
    free_w = [c for i, c in enumerate(weight) if i not in (*of_w, *batch_w)]
    free_x = [c for j, c in enumerate(inputs) if j not in (*of_x, *batch_x)]
    free = (free_w, free_x) if left else (free_x, free_w)
    return _Letters("".join(inputs), "".join(weight), "".join([*(weight[i] for i in batch_w), *free[0], *free[1]]))


def _contraction(
    eqn: JaxprEqn, view: View, letters: _Letters, gone: set[str]
) -> tuple[Contraction, Array, Array] | None:
    """How the factors contract, the one that meets x first; axes of length one are left out."""
    found = []
    for factor in (view.a, view.b):
        owned = view.owned(factor)
        names = "".join(letters.weight[i] for i in owned)
        found.append((names, factor.reshape(*(factor.shape[i] for i in owned), factor.shape[-1])))
    contracted = set(letters.weight) - set(letters.y) - gone
    found.sort(key=lambda names_factor: contracted.isdisjoint(names_factor[0]))
    (first, a), (second, b) = found
    if contracted.isdisjoint(first):
        return None
    x, weight, y = ("".join(c for c in name if c not in gone) for name in (letters.x, letters.weight, letters.y))
    return Contraction(x, weight, f"{first}r", f"{second}r", y, eqn.params["precision"]), a, b


def _squeezed(array: Array, letters: str, gone: set[str]) -> Array:
    axes = _places(letters, gone)
    return jax.lax.squeeze(array, axes) if axes else array


def _restored(array: Array, letters: str, gone: set[str]) -> Array:
    axes = _places(letters, gone)
    return jax.lax.expand_dims(array, axes) if axes else array


def _places(letters: str, gone: set[str]) -> Sequence[int]:
    return [i for i, letter in enumerate(letters) if letter in gone]
