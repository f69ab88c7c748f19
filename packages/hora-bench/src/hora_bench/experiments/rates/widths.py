"""The range of rates whose accuracy is within a margin of the best, from few seeds.

The mean of few seeds at the best of many rates is too high: it is the best partly by luck. A threshold below it lies
too high as well, the more so the flatter the curve is, and what is called a range is too narrow. A dip by luck cuts it
once more. Here the best is chosen by all seeds but one and valued by that one, and the curve is made to rise to one
peak and to fall from there, by least squares, so that what is above a threshold is one range. Where the true curve is
flat, a range of eight seeds still is half a doubling too narrow in the mean, without these two cures 1.5 (simulated
with the scatter of a screen, in the tests).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import isotonic_regression

from hora_bench.stats import LEVEL

DRAWS: Final = 1000
Accuracies = Float[np.ndarray, "seeds rates"]


class Range(NamedTuple):
    """Of rates, as logarithms to base 2.

    Attributes
    ----------
    low, high
        Its ends.
    fall
        The rate above the best from which on accuracy is lower by the larger margin.
    level
        Accuracy at the best rate, in points.
    open_low, open_high, open_fall
        Whether that is an end of the grid: the true one lies beyond.
    """

    low: float
    high: float
    fall: float
    level: float
    open_low: bool
    open_high: bool
    open_fall: bool

    @property
    def width(self) -> float:
        """Doublings from one end to the other."""
        return self.high - self.low


def one_peak(means: Float[np.ndarray, " rates"]) -> Float[np.ndarray, " rates"]:
    """The nearest curve that rises to a peak and falls from there: least squares, the lower of equal peaks.

    Examples
    --------
    >>> one_peak(np.array([1.0, 5.0, 3.0, 4.0, 0.0]))
    array([1. , 5. , 3.5, 3.5, 0. ])
    """
    found = []
    for peak in range(1, len(means) + 1):  # the first `peak` rise
        rising = isotonic_regression(means[:peak]).x
        falling = isotonic_regression(means[peak:], increasing=False).x if peak < len(means) else means[:0]
        curve = np.concatenate([rising, falling])
        found.append((float(((curve - means) ** 2).sum()), peak, curve))
    return min(found, key=lambda one: (round(one[0], 9), one[1]))[2]


def level_of(accuracies: Accuracies, counts: Int[np.ndarray, " seeds"]) -> float:
    """Accuracy at the best rate, which is chosen without the seed that values it.

    Parameters
    ----------
    accuracies
        Of every seed at every rate.
    counts
        How often each seed was drawn; all copies of a seed are left out together.
    """
    total, values = counts @ accuracies, 0.0
    for seed in np.flatnonzero(counts):
        others = total - counts[seed] * accuracies[seed]
        chosen = others if counts[seed] < counts.sum() else total  # one seed has no others
        values += counts[seed] * accuracies[seed, int(chosen.argmax())]
    return float(values / counts.sum())


def range_of(
    accuracies: Accuracies,
    rates: Sequence[float],
    *,
    margin: float,
    fall: float,
    counts: Int[np.ndarray, " seeds"] | None = None,
) -> Range:
    """The range around the peak of the curve of means.

    Parameters
    ----------
    accuracies
        In points, of every seed at every rate.
    rates
        Rising.
    margin, fall
        Points below the best, of the range and of the fall above it.
    counts
        How often each seed was drawn; once when left out.

    Notes
    -----
    Between two rates accuracy is taken to be linear in the logarithm of the rate.
    """
    counts = np.ones(len(accuracies), int) if counts is None else counts
    curve, logs = one_peak(counts @ accuracies / counts.sum()), np.log2(rates)
    level = min(level_of(accuracies, counts), float(curve.max()))
    place = int(curve.argmax())
    low, open_low = _crossing(logs[place::-1], curve[place::-1], level - margin)
    high, open_high = _crossing(logs[place:], curve[place:], level - margin)
    fallen, open_fall = _crossing(logs[place:], curve[place:], level - fall)
    return Range(low, high, fallen, level, open_low, open_high, open_fall)


def _crossing(logs: np.ndarray, falling: np.ndarray, threshold: float) -> tuple[float, bool]:
    """Where a curve that falls goes below a threshold, which it begins above; its end, and True, where it does not."""
    below = np.flatnonzero(falling < threshold)
    if not len(below):
        return float(logs[-1]), True
    after = int(below[0])
    share = (falling[after - 1] - threshold) / (falling[after - 1] - falling[after])
    return float(logs[after - 1] + share * (logs[after] - logs[after - 1])), False


def draws_of(seeds: int, seed: int = 0) -> Int[np.ndarray, "draws seeds"]:
    """How often each seed is drawn by each resampling; the same for everything that is compared, which pairs it."""
    rng = np.random.default_rng(seed)
    return np.stack([np.bincount(rng.integers(seeds, size=seeds), minlength=seeds) for _ in range(DRAWS)])


def bounds(values: Float[np.ndarray, " draws"]) -> tuple[float, float]:
    """Percentile interval of resampled values."""
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def cut(opened: np.ndarray) -> bool:
    """Whether so many resamplings ended at an end of the grid that an interval of them does."""
    return float(np.mean(opened)) > (1 - LEVEL) / 2
