"""Interleaved timing: contenders take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import numpy as np
from jaxtyping import Float

Clock = Literal["wall", "cpu"]
CLOCKS: Final[Mapping[Clock, Callable[[], float]]] = {"wall": time.perf_counter, "cpu": time.process_time}
QUARTILES: Final = (25, 50, 75)


def take_turns(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    clock: Clock = "wall",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Float[np.ndarray, " rounds"]]:
    """Seconds of each contender in each round, in an order that rotates.

    Parameters
    ----------
    contenders
        Name to what is timed; it returns when its work is done.
    rounds
        How many times each.
    clock
        ``"wall"``, or ``"cpu"``: processor seconds of this process, all threads, which leave out what others take.
    progress
        Called with rounds done and in total.
    """
    read, names = CLOCKS[clock], list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = read()
            contenders[name]()
            seconds[name].append(read() - start)
        progress(turn + 1, rounds)
    return {name: np.array(values) for name, values in seconds.items()}


def summary(seconds: Float[np.ndarray, " rounds"]) -> dict[str, float]:
    """Median and quartiles, four digits."""
    low, middle, high = np.percentile(seconds, QUARTILES)
    return {"median_s": _four(middle), "low_s": _four(low), "high_s": _four(high)}


def ratio(seconds: Float[np.ndarray, " rounds"], reference: Float[np.ndarray, " rounds"]) -> dict[str, float]:
    """Median and quartiles of the ratio within each round, which cancels what slows the whole round."""
    low, middle, high = np.percentile(seconds / reference, QUARTILES)
    return {"ratio": round(float(middle), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def _four(value: float) -> float:
    return float(f"{value:.4g}")
