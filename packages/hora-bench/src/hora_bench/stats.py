"""Means of few runs with intervals that do not hide how few they are, and what may be said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final, Literal

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

LEVEL: Final = 0.95
POWER: Final = 0.8
MARGIN: Final = 1.0  # points within which two methods count as equal
DRAWS: Final = 2000
LEAST_ABOVE: Final = 10.0  # points above chance below which shares of them mean nothing

Word = Literal["better", "worse", "equal", "not resolved"]


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two methods with the same seeds, in percentage points.

    Attributes
    ----------
    mean, low, high
        Mean over seeds and its interval, Student's t; one seed has none.
    seeds
        So many were paired.
    detectable
        The true difference that so many seeds would have shown in four of five such experiments; None for one seed.
    level
        Of the interval.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int
    detectable: float | None
    level: float = LEVEL

    @classmethod
    def of(
        cls, values: Sequence[float], reference: Sequence[float], *, level: float = LEVEL, digits: int = 2
    ) -> Difference:
        """Of accuracies or losses, one per seed and in the same order: what both share, subset and order, cancels.

        Examples
        --------
        >>> Difference.of([91.0, 93.0, 92.0], [90.0, 91.0, 92.0])
        Difference(mean=1.0, low=-1.48, high=3.48, seeds=3, detectable=3.09, level=0.95)
        """
        differences = np.subtract(values, reference)
        mean, seeds = round(float(differences.mean()), digits), len(differences)
        if seeds == 1:
            return cls(mean, None, None, 1, None, level)
        half = float(stats.t.ppf((1 + level) / 2, seeds - 1) * stats.sem(differences))
        bounds = (round(float(differences.mean()) + sign * half, digits) for sign in (-1, 1))
        return cls.stored(mean, *bounds, seeds, level)

    @classmethod
    def stored(cls, mean: float, low: float | None, high: float | None, seeds: int, level: float = LEVEL) -> Difference:
        """Of a mean with its interval, as files have it."""
        if low is None or high is None:
            return cls(mean, None, None, seeds, None, level)
        half, powers = (high - low) / 2, stats.t.ppf([(1 + level) / 2, POWER], seeds - 1)
        return cls(mean, low, high, seeds, round(half * float(1 + powers[1] / powers[0]), 2), level)

    def word(self, margin: float = MARGIN) -> Word:
        """What the interval allows to say; equal is within `margin`, which is stated before anything is measured.

        An interval that is no wider than the margin always says something: that is when a race stops.

        Examples
        --------
        >>> Difference.of([91.0, 93.0, 92.0], [90.0, 91.0, 92.0]).word()
        'not resolved'
        """
        if self.low is None or self.high is None:
            return "not resolved"
        if -margin <= self.low and self.high <= margin:
            return "equal"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "not resolved"


def level_of_looks(looks: int) -> float:
    """Level of each interval of a race that may stop at any of several looks, so that all hold with `LEVEL`.

    Bonferroni: looks at the same seeds depend on each other, which makes it conservative.

    Examples
    --------
    >>> level_of_looks(1), level_of_looks(5)
    (0.95, 0.99)
    """
    return round(1 - (1 - LEVEL) / looks, 6)


def mean_interval(accuracies_pct: Sequence[float], examples: int) -> dict[str, float]:
    """Mean accuracy over seeds and its 95 % interval: ``mean_pct``, ``low_pct`` and ``high_pct``.

    Parameters
    ----------
    accuracies_pct
        One per seed, judged on the same examples.
    examples
        How many examples judge each.

    Notes
    -----
    Wilson's interval for ``examples`` independent answers, and added to its half-width in squares Student's t of the
    scatter between seeds. Averaging seeds does not shrink the first part: they share the examples.

    Examples
    --------
    >>> mean_interval([90.0], 1000)
    {'mean_pct': 90.0, 'low_pct': 87.98, 'high_pct': 91.71}
    """
    z, runs = NormalDist().inv_cdf((1 + LEVEL) / 2), len(accuracies_pct)
    mean = float(np.mean(accuracies_pct))
    share, spread = mean / 100, z * z / examples
    centre = (share + spread / 2) / (1 + spread)
    half = np.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    seeds = stats.t.ppf((1 + LEVEL) / 2, runs - 1) * stats.sem(accuracies_pct) / 100 if runs > 1 else 0.0
    low, high = (100 * float(share + sign * np.hypot(sign * (centre - share) + half, seeds)) for sign in (-1, 1))
    return {"mean_pct": round(mean, 2), "low_pct": round(max(low, 0), 2), "high_pct": round(min(high, 100), 2)}


def two_way_interval(
    right: Bool[np.ndarray, "seeds examples"], reference: Bool[np.ndarray, "seeds examples"], *, seed: int = 0
) -> tuple[float, float, float]:
    """Mean difference in points, and its 95 % interval by resampling seeds and examples alike.

    Parameters
    ----------
    right, reference
        Whether two methods were right, with the same seeds on the same examples.
    seed
        Of the resampling.

    Notes
    -----
    A t-interval over seeds speaks of these examples; this one of others like them, too. The pigeonhole bootstrap
    (Owen 2007) is conservative. With few seeds it is too narrow on their side: look at both.
    """
    differences = right.astype(float) - reference.astype(float)
    rng, (seeds, examples) = np.random.default_rng(seed), differences.shape
    means = [
        differences[np.ix_(rng.integers(seeds, size=seeds), rng.integers(examples, size=examples))].mean()
        for _ in range(DRAWS)
    ]
    low, high = np.percentile(means, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return 100 * float(differences.mean()), 100 * float(low), 100 * float(high)


def kept(
    accuracies_pct: Float[np.ndarray, "seeds ..."],
    clean_pct: Float[np.ndarray, "seeds ..."],
    chance_pct: float,
) -> Float[np.ndarray, "seeds ..."] | None:
    """Percent of what clean accuracy is above chance that is left; None where nothing was above.

    The mean of the values is the ratio of means ``(accuracy - chance) / (clean - chance)``, and their scatter that of
    the ratio to first order (Cochran 1977, 6.4): a single seed near chance does not blow it up. So paired differences
    of two methods are differences of their values.

    Parameters
    ----------
    accuracies_pct, clean_pct
        Of the same seeds in the same order, or of each example 0 or 100.
    chance_pct
        What guessing has.

    Examples
    --------
    >>> kept(np.array([40.0, 60.0]), np.array([80.0, 100.0]), 10.0)
    array([43.75, 56.25])
    """
    values, clean = accuracies_pct - chance_pct, clean_pct - chance_pct
    if clean.mean() < LEAST_ABOVE:
        return None
    ratio = values.mean() / clean.mean()
    return 100 * (ratio + (values - ratio * clean) / clean.mean())


def resampled(values: Float[np.ndarray, "seeds examples"], *, seed: int = 0) -> Float[np.ndarray, " draws"]:
    """Means of resamples of seeds and examples alike, as of `two_way_interval`; equal shapes are drawn alike."""
    rng, (seeds, examples) = np.random.default_rng(seed), values.shape
    of_seeds, of_examples = (rng.multinomial(n, np.full(n, 1 / n), DRAWS) / n for n in (seeds, examples))
    return ((of_seeds @ values) * of_examples).sum(1)


def guessing(labels: np.ndarray) -> float:
    """Accuracy in percent of one answer for all examples, the most frequent.

    Examples
    --------
    >>> guessing(np.array([0, 0, 0, 1]))
    75.0
    """
    counts = np.unique(labels, return_counts=True)[1]
    return 100 * float(counts.max() / counts.sum())


def chance_bound(labels: np.ndarray, *, level: float = 0.999) -> float:
    """Accuracy in percent that guessing stays below with probability `level`, whatever is guessed.

    Labels that are permuted without regard to the images make the number of right answers hypergeometric in each
    class; the binomial of the most frequent class bounds it (Hoeffding 1963, sampling without replacement).

    Examples
    --------
    >>> round(chance_bound(np.arange(10).repeat(20)), 2)
    17.0
    """
    share = np.unique(labels, return_counts=True)[1].max() / len(labels)
    return 100 * float(stats.binom.ppf(level, len(labels), share)) / len(labels)
