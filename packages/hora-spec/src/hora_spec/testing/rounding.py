"""Running error analysis: arrays that carry a bound of what rounding may have done to them.

``Rounded(value, error)`` stands for every array that an honest computation may hold where exact arithmetic holds
`value`: ``|computed - value| <= error``. Each operation propagates the errors of its operands and adds its own,
following Higham, "Accuracy and Stability of Numerical Algorithms", chapters 2 and 3: with unit roundoff u,

    fl(x op y) = (x op y)(1 + d),  |d| <= u
    a sum of n terms, in any order, with or without FMA:  |d| <= gamma_n = n u / (1 - n u)

so a dot product is off by at most ``|x| e_y + e_x |y| + e_x e_y + gamma_n (|x| + e_x)(|y| + e_y)``, summed. Products
may also underflow, or be flushed to zero: each adds the smallest normal number at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Format(NamedTuple):
    """A floating-point format: unit roundoff u, and the most that one underflow loses."""

    unit: float
    underflow: float

    def gamma(self, n: int) -> float:
        """Bound ``n u / (1 - n u)`` of the relative error of n roundings in a row."""
        return n * self.unit / (1 - n * self.unit)


FORMATS = {
    "float64": Format(2.0**-53, 2.0**-1022),
    "float32": Format(2.0**-24, 2.0**-126),
    "float16": Format(2.0**-11, 2.0**-24),  # computed in float32 on most machines, so it underflows gradually
    "bfloat16": Format(2.0**-8, 2.0**-126),
}
"""Formats that a backend may compute in."""


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """Exact float64 `value` of a quantity, and a bound of the error that computing it in `format` makes.

    Parameters
    ----------
    value, error
        Arrays of one shape.
    format
        What the computation rounds to.
    """

    __array_ufunc__ = None  # NumPy leaves operators between an array and a Rounded to Rounded

    value: Array
    error: Array
    format: Format

    @classmethod
    def exact(cls, value: Array, fmt: Format) -> Rounded:
        """An input that the computation is given as it is."""
        value = np.asarray(value, np.float64)
        return cls(value, np.zeros_like(value), fmt)

    @classmethod
    def cast(cls, value: Array, fmt: Format) -> Rounded:
        """An input that the computation rounds to its format first."""
        return cls.exact(value, fmt)._rounding(1)

    @property
    def magnitude(self) -> Array:
        """The largest absolute value that the computation may hold."""
        return np.abs(self.value) + self.error

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.value.shape

    def each(self, function: Callable[[Array], Array]) -> Rounded:
        """The same rearrangement, exact, of value and error: transpose, reshape, index, repeat."""
        return Rounded(function(self.value), function(self.error), self.format)

    def __add__(self, other: Rounded) -> Rounded:
        return Rounded(self.value + other.value, self.error + other.error, self.format)._rounding(1)

    def __sub__(self, other: Rounded) -> Rounded:
        return Rounded(self.value - other.value, self.error + other.error, self.format)._rounding(1)

    def __mul__(self, other: Rounded) -> Rounded:
        error = self.magnitude * other.error + self.error * np.abs(other.value)
        return Rounded(self.value * other.value, error, self.format)._rounding(1)._underflow(1)

    def __truediv__(self, other: Rounded) -> Rounded:
        value = self.value / other.value
        smallest = np.maximum(np.abs(other.value) - other.error, self.format.underflow)
        error = (self.error + np.abs(value) * other.error) / smallest
        return Rounded(value, error, self.format)._rounding(1)._underflow(1)

    def __matmul__(self, other: Rounded) -> Rounded:
        n = self.shape[-1]
        error = self.magnitude @ other.error + self.error @ np.abs(other.value)
        error = error + self.format.gamma(n) * (self.magnitude @ other.magnitude)
        products = (self.magnitude > 0).astype(np.float64) @ (other.magnitude > 0).astype(np.float64)
        return Rounded(self.value @ other.value, error + products * self.format.underflow, self.format)

    def scale(self, constant: float) -> Rounded:
        """Product with a constant that is itself rounded; one costs nothing."""
        if constant == 1:
            return self
        scaled = Rounded(self.value * constant, self.error * abs(constant), self.format)
        return scaled._rounding(2)._underflow(1)

    def sum(self, axis: int | tuple[int, ...]) -> Rounded:
        """Sum along axes, in any order."""
        value, error, magnitude = (part.sum(axis=axis) for part in (self.value, self.error, self.magnitude))
        n = self.value.size // max(value.size, 1)
        return Rounded(value, error + self.format.gamma(n - 1) * magnitude, self.format)

    def mean(self, axis: int) -> Rounded:
        """Mean along an axis: a sum, times a rounded 1/n."""
        return self.sum(axis).scale(1 / self.shape[axis])

    def sqrt(self, smallest: float) -> Rounded:
        """Square root of what is never computed below `smallest`."""
        root = np.sqrt(self.value)
        low = np.sqrt(np.maximum(self.value - self.error, smallest))
        # |sqrt(x) - sqrt(y)| = |x - y| / (sqrt x + sqrt y)
        return Rounded(root, self.error / (root + low), self.format)._rounding(2)

    def _rounding(self, times: int) -> Rounded:
        return Rounded(self.value, self.error + self.format.gamma(times) * self.magnitude, self.format)

    def _underflow(self, times: int) -> Rounded:
        return Rounded(self.value, self.error + times * self.format.underflow * (self.magnitude > 0), self.format)


def either(one: Rounded, other: Rounded) -> Rounded:
    """One quantity, computed in whichever of two orders an implementation prefers."""
    return Rounded(one.value, np.maximum(one.error, other.error), one.format)


def join(parts: list[Rounded], axis: int) -> Rounded:
    """Arrays one after the other along an axis."""
    value, error = (np.concatenate(side, axis) for side in zip(*((p.value, p.error) for p in parts), strict=True))
    return Rounded(value, error, parts[0].format)


def total(terms: list[Rounded]) -> Rounded:
    """Sum of several arrays of one shape, in any order."""
    return join([term.each(lambda array: array[None]) for term in terms], 0).sum(0)
