"""One comparison, and the message of its failure."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hora_spec.goldens import Golden
from hora_spec.testing.backend import Backend
from hora_spec.testing.case import Case, param_dtype
from hora_spec.testing.rounding import FORMATS, Format

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Claim:
    """That a backend keeps a rule; failing says value, rule, call and the line that replays it.

    Parameters
    ----------
    check, backend, case, dtype
        ``check(backend, case, dtype)`` makes the claim.
    rule
        The rules of the specification.
    call
        The backend's function and its arguments.
    """

    check: str
    backend: Backend
    case: Case | Golden
    dtype: str
    rule: str = ""
    call: str = ""

    def about(self, rule: str, call: str) -> Self:
        """The claim of one rule and call among several."""
        return replace(self, rule=rule, call=call)

    @property
    def format(self) -> Format:
        """Format of activations and weights."""
        return FORMATS[self.dtype]

    @property
    def wide(self) -> Format:
        """Format of parameters, and of what is computed from them alone."""
        return FORMATS[param_dtype(self.dtype)]

    def failure(self, what: str) -> AssertionError:
        """The error to raise."""
        return AssertionError(
            f"{self.backend.name}: {what} (spec {self.rule})\n"
            f"  call:   {self.call}\n"
            f"  replay: {self.check}(backend, {self.case!r}, {self.dtype!r})"
        )

    def close(self, name: str, got: Array, expected: Array, bound: Array) -> float:
        """Worst error of an array as a fraction of its bound; above 1 raises."""
        got = np.asarray(got)
        if got.shape != expected.shape:
            raise self.failure(f"{name} must have shape {expected.shape}, got {got.shape}")
        error = np.abs(got.astype(np.float64) - expected)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(error == 0, 0.0, np.where(np.isnan(error), np.inf, error / bound))
        at = np.unravel_index(np.argmax(ratio), ratio.shape)
        if ratio[at] > 1:
            raise self.failure(
                f"{name}{_index(at)} must be {expected[at]:.9g} +- {bound[at]:.3g}, got {got[at]:.9g}, "
                f"{ratio[at]:.3g} times the bound away"
            )
        return float(ratio[at])

    def equal(self, name: str, got: Array, expected: Array) -> float:
        """0 if shape, dtype and values are equal to the bit (but the sign of zero), else raises."""
        got = np.asarray(got)
        if (got.shape, got.dtype) != (expected.shape, expected.dtype):
            raise self.failure(f"{name} must be {expected.dtype} {expected.shape}, got {got.dtype} {got.shape}")
        wrong = np.argwhere(got != expected)
        if len(wrong):
            at = tuple(wrong[0])
            raise self.failure(
                f"{name}{_index(at)} must be exactly {expected[at]}, got {got[at]}; {len(wrong)} of {got.size} differ"
            )
        return 0.0

    def keys(self, name: str, got: Iterable[str], expected: Iterable[str]) -> None:
        """Raise unless both hold the same keys."""
        if sorted(got) != sorted(expected):
            raise self.failure(f"{name} must have the keys {sorted(expected)}, got {sorted(got)}")


def _index(at: tuple[Any, ...]) -> str:
    return f"[{', '.join(str(int(i)) for i in at)}]"
