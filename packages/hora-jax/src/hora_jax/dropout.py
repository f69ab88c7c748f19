"""Dropout on the input of a branch: a mask for each product, drawn from a key that the caller passes."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from hora_spec import HoraError
from jaxtyping import Array

from hora_jax.routes import Route, explicit

ARGUMENT = "dropout_key"
"""Of adapted functions, which never pass it on."""

_ABSENT = object()


@dataclass(frozen=True)
class Dropout:
    """Entries of a branch's input are zero with probability `rate`, the branch divided by ``1 - rate``.

    Products take keys of their own: `at` a place in the program, and in a loop at each step of it.
    """

    rate: float
    key: Array

    def at(self, number: Any) -> "Dropout":
        """With the key of one place, or of one step of a loop."""
        return replace(self, key=jax.random.fold_in(self.key, number))

    def drop(self, x: Array, b: Array, *, over: frozenset[str]) -> tuple[Array, Array]:
        """A branch's input with entries dropped, and the factor that makes up for them.

        In `jax.shard_map`, shards along the axes `over`, which hold different inputs, drop entries of their own.
        """
        key, sharding = self.key, explicit(x)
        for axis in sorted(over):
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        keep = jax.random.bernoulli(key, 1 - self.rate, x.shape)
        keep = keep if sharding is None else jax.sharding.reshard(keep, sharding)
        return jnp.where(keep, x, jnp.zeros_like(x)), b / (1 - self.rate)


def check(rate: float, route: Route) -> None:
    """Raise unless there is such a rate, and a branch for it to act on."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise HoraError(f"dropout must be a number in [0, 1), got {rate!r}")
    if rate and route == "merge":
        raise HoraError(
            f'dropout acts on the input of a branch alone, got dropout={rate} with route="merge", which has none: '
            'pass route="auto" or "branch"'
        )


def from_arguments(rate: float, kwargs: dict[str, Any], *, required: bool = True) -> Dropout | None:
    """Dropout of one call, whose keyword arguments lose the key; None where nothing is dropped."""
    key = kwargs.pop(ARGUMENT, _ABSENT)
    if key is _ABSENT and rate and required:
        raise HoraError(
            f"a call with dropout={rate} says whether it trains, got no {ARGUMENT}: pass {ARGUMENT}=key, another one "
            f"in each step, or {ARGUMENT}=None to evaluate"
        )
    if key is None or key is _ABSENT:
        return None
    if not rate:
        raise HoraError(f"a {ARGUMENT} is for an adapted function with dropout, got one without: pass dropout=rate")
    if not _is_key(key):
        raise HoraError(f"{ARGUMENT} is one key, as jax.random.key makes, got {key!r}: split keys before the call")
    return Dropout(rate, key)


def _is_key(key: Any) -> bool:
    if not hasattr(key, "dtype"):
        return False
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.shape == ()
    return key.dtype == jnp.uint32 and key.shape == (2,)
