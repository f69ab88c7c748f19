"""Means of few runs with intervals that do not hide how few they are."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from scipy import stats


def mean_interval(accuracies_pct: Sequence[float], examples: int, *, level: float = 0.95) -> dict[str, float]:
    """Mean accuracy over seeds and its interval.

    Parameters
    ----------
    accuracies_pct
        One per seed, judged on the same examples.
    examples
        How many examples judge each.
    level
        Of the interval.

    Returns
    -------
    dict
        ``mean_pct``, ``low_pct`` and ``high_pct``.

    Notes
    -----
    Wilson's interval for ``examples`` independent answers, and added to its half-width in squares the scatter between
    seeds. Averaging seeds does not shrink the first part: they share the examples.

    Examples
    --------
    >>> mean_interval([90.0], 1000)
    {'mean_pct': 90.0, 'low_pct': 87.98, 'high_pct': 91.71}
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    mean = float(np.mean(accuracies_pct))
    share, spread = mean / 100, z * z / examples
    centre = (share + spread / 2) / (1 + spread)
    half = np.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    seeds = 0.0
    if len(accuracies_pct) > 1:
        seeds = z * np.std(accuracies_pct, ddof=1) / 100 / np.sqrt(len(accuracies_pct))
    low, high = (100 * float(share + sign * np.hypot(sign * (centre - share) + half, seeds)) for sign in (-1, 1))
    return {"mean_pct": round(mean, 2), "low_pct": round(max(low, 0), 2), "high_pct": round(min(high, 100), 2)}


def paired_interval(
    accuracies_pct: Sequence[float], reference_pct: Sequence[float], *, level: float = 0.95
) -> dict[str, float | None]:
    """Mean difference of two methods that ran with the same seeds, and its interval.

    Parameters
    ----------
    accuracies_pct, reference_pct
        One per seed, in the same order.
    level
        Of the interval.

    Returns
    -------
    dict
        ``mean_pct``, ``low_pct`` and ``high_pct`` in percentage points; one seed has no interval.

    Notes
    -----
    Student's t of the differences: what both share, the subset and the order of the data, cancels.

    Examples
    --------
    >>> paired_interval([91.0, 93.0, 92.0], [90.0, 91.0, 92.0])
    {'mean_pct': 1.0, 'low_pct': -1.48, 'high_pct': 3.48}
    """
    differences = np.subtract(accuracies_pct, reference_pct)
    mean, seeds = float(differences.mean()), len(differences)
    if seeds == 1:
        return {"mean_pct": round(mean, 2), "low_pct": None, "high_pct": None}
    half = float(stats.t.ppf((1 + level) / 2, seeds - 1) * stats.sem(differences))
    return {"mean_pct": round(mean, 2), "low_pct": round(mean - half, 2), "high_pct": round(mean + half, 2)}
