"""A planned weight, or a part or rearrangement of one, as it moves through a function."""

from dataclasses import dataclass, field, replace
from string import ascii_lowercase

import jax
import jax.numpy as jnp
from jaxtyping import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """Stands for ``w + sum_r a * b``; a and b have w's axes, of length one where they lack them, and ranks behind.

    Attributes
    ----------
    w
        The base's values.
    a, b
        Factors (*axes, ranks), broadcast against each other. B holds the scaling.
    path
        Of the planned leaf.
    constant
        Whether w is made of frozen weights alone, so that no gradient is lost if none is taken of it.
    codes, decoded
        Whether w holds codes of a quantised weight rather than the weight, and whether it was computed from such codes.
    axes
        Which axis of the leaf each of w's axes is; None where w is not the whole leaf as it is stored.
    """

    w: Array
    a: Array
    b: Array
    path: str = field(metadata={"static": True})
    constant: bool = field(metadata={"static": True})
    codes: bool = field(default=False, metadata={"static": True})
    decoded: bool = field(default=False, metadata={"static": True})
    axes: tuple[int, ...] | None = field(default=None, metadata={"static": True})

    @property
    def untouched(self) -> bool:
        """Whether this is the planned leaf, as it was given."""
        return self.axes == tuple(range(self.w.ndim))

    def moved(self, w: Array, a: Array, b: Array, *, axes: tuple[int, ...] | None = None) -> "View":
        """The view of the same weight elsewhere."""
        return replace(self, w=w, a=a, b=b, axes=axes)

    def owned(self, factor: Array) -> tuple[int, ...]:
        """Axes that a factor has."""
        return tuple(i for i, size in enumerate(self.w.shape) if size != 1 and factor.shape[i] == size)

    def dense(self) -> Array:
        """``w + delta``, summed in float32 or better and rounded once to w's dtype (spec M1)."""
        letters = ascii_lowercase[: self.w.ndim]
        names = ["".join(letters[i] for i in self.owned(f)) + "R" for f in (self.a, self.b)]
        out = "".join(letter for letter in letters if any(letter in name for name in names))
        small = [f.reshape(*(f.shape[i] for i in self.owned(f)), -1) for f in (self.a, self.b)]
        delta = jnp.einsum(f"{names[0]},{names[1]}->{out}", *small, precision="highest").reshape(self.w.shape)
        wide = jnp.promote_types(self.w.dtype, delta.dtype)
        return (self.w.astype(wide) + delta.astype(wide)).astype(self.w.dtype)
