"""Values that several processes share: brought to each host, and written to disk by the first process alone."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from hora_spec import HoraError
from jax.experimental import multihost_utils


def on_host(value: Any) -> np.ndarray:
    """All of an array; of one whose parts other processes hold, every process has to ask for it."""
    if is_spread(value):
        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


def is_spread(value: Any) -> bool:
    """Whether this process lacks a part of an array."""
    return isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated)


def by_the_first(write: Callable[[], Any], values: Any) -> Any:
    """What `write` returns in the first process, None in others, where all processes that hold `values` are called.

    If they hold parts of them, they go on together, and if the first one fails, all do. Where each holds all, the first
    may be called alone, as in ``if jax.process_index() == 0``, so that nobody waits for the others.
    """
    if not any(map(is_spread, jax.tree.leaves(values))):
        return write() if jax.process_index() == 0 else None
    done, result = False, None
    try:
        if jax.process_index() == 0:
            result, done = write(), True
    finally:
        done = bool(multihost_utils.broadcast_one_to_all(np.array(done)))
    if not done:
        raise HoraError("the first process writes for all, which failed there: its own error says why (spec E2)")
    return result
