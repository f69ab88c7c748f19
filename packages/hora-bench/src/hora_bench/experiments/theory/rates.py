"""Rates of recovery: fits at growing sample sizes, log-log slopes with bootstrap intervals, and gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from .fit import fit, losses
from .model import Problem, Sharing

LOSSES: Final = ("d2", "value_error", "query_error", "prediction_error")
BOOTSTRAP: Final = 2000
INTERVAL_PCT: Final = (2.5, 97.5)
TEST_SAMPLES: Final = 4000
DIGITS: Final = 6

LIMITS: Final = tuple(
    """\
The gap is in the recovery of updates when a head is redundant. Prediction improves at the same rate with and \
without sharing (with sharing, which fits fewer parameters, its constant is smaller), so this says nothing about \
accuracy.
Only the products B A are compared: A and B apart are never identified.
Sharing A alone, or B alone, does not identify the updates (identify, sharings a and b).
One true head, width 3, rank 1, and one vector per head that is B of Q and of V at once: a generator that is known, \
invertible and the same for Q and V. Where Q and V have second layers of their own and the hidden width is at least \
heads x rank, generated B are as free as free ones, which is sharing a: then nothing is identified either.
What is not identified ends where rounding takes it: a rerun without sharing repeats slopes within their intervals, \
not digits.\
""".splitlines()
)


@dataclass(frozen=True, slots=True)
class Grid:
    """Sizes of one run: sample sizes, trials and sharings; every trial is one problem with nested samples."""

    sizes: tuple[int, ...]
    trials: int
    sharings: tuple[Sharing, ...] = ("full", "none")
    fitted_heads: tuple[int, ...] = (2, 1)

    def pieces(self) -> Iterator[tuple[int, Sharing, int]]:
        """``(fitted heads, sharing, trial)`` of every piece of work."""
        for trial in range(self.trials):
            for heads in self.fitted_heads:
                for sharing in self.sharings:
                    yield heads, sharing, trial


GRIDS: Final[Mapping[str, Grid]] = {
    "quick": Grid(sizes=(100, 316, 1000), trials=6),
    "default": Grid(sizes=(100, 316, 1000, 3162, 10_000), trials=16),
    "full": Grid(sizes=(100, 316, 1000, 3162, 10_000, 31_623), trials=40, sharings=("full", "a", "b", "none")),
}


def measure(heads: int, sharing: Sharing, trial: int, *, sizes: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Losses of one trial at every sample size; the same problem and samples for every model.

    Returns
    -------
    dict
        One list per loss of ``LOSSES``, in the order of ``sizes``; ``starts`` and ``unreached`` fits, in total.
    """
    rng = np.random.default_rng([seed, trial])
    problem = Problem.draw(rng)
    test = problem.sample(TEST_SAMPLES, rng, noise=0.0)
    data = problem.sample(max(sizes), rng)
    fits = [fit(problem, sharing, heads, data.first(n), np.random.default_rng([seed, trial, n])) for n in sizes]
    found = [losses(problem, one.factors, test) for one in fits]
    return {
        **{name: [float(f"{one[name]:.{DIGITS}g}") for one in found] for name in LOSSES},
        "starts": sum(one.starts for one in fits),
        "unreached": sum(not one.reached for one in fits),
    }


def slope(sizes: tuple[int, ...], values: Float[np.ndarray, "*draws sizes"]) -> Float[np.ndarray, "*draws"]:
    """Least-squares slope of ``log(values)`` in ``log(sizes)``."""
    x = np.log(sizes) - np.mean(np.log(sizes))
    return np.log(values) @ x / (x @ x)


def summarise(sizes: tuple[int, ...], values: Float[np.ndarray, "trials sizes"], *, seed: int = 0) -> dict:
    """Mean and median over trials with their slopes, and 95 % intervals from resampled trials.

    Returns
    -------
    dict
        For ``mean`` and ``median``: ``value`` per size, ``interval`` per size, ``slope`` and ``slope_interval``.
    """
    trials = len(values)
    draws = values[np.random.default_rng(seed).integers(trials, size=(BOOTSTRAP, trials))]
    summary = {}
    for name, statistic in (("mean", np.mean), ("median", np.median)):
        value, resampled = statistic(values, axis=0), statistic(draws, axis=1)
        summary[name] = {
            "value": value.tolist(),
            "interval": np.percentile(resampled, INTERVAL_PCT, axis=0).T.tolist(),
            "slope": float(slope(sizes, value)),
            "slope_interval": np.percentile(slope(sizes, resampled), INTERVAL_PCT).tolist(),
        }
    return summary


def curves(grid: Grid, measured: Mapping[tuple[int, Sharing, int], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record per fitted heads, sharing and loss, with what ``summarise`` returns."""
    return [
        {
            "fitted_heads": heads,
            "sharing": sharing,
            "loss": loss,
            **summarise(grid.sizes, np.array([measured[heads, sharing, t][loss] for t in range(grid.trials)])),
        }
        for heads in grid.fitted_heads
        for sharing in grid.sharings
        for loss in LOSSES
    ]


def gates(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether the slopes are where the theorems and the prototype put them: name, value, bounds, passed."""

    def judge(name: str, low: float, high: float, pick: Callable[[], float]) -> dict[str, Any]:
        value = pick()
        return {"gate": name, "value": value, "low": low, "high": high, "passed": low <= value <= high}

    def of(heads: int, sharing: Sharing, loss: str, statistic: str) -> float:
        found = next(r for r in records if (r["fitted_heads"], r["sharing"], r["loss"]) == (heads, sharing, loss))
        return found[statistic]["slope"]

    def control() -> float:
        return of(1, "full", "d2", "mean") - of(1, "none", "d2", "mean")

    return [
        judge("shared: slope of mean D2", -0.7, -0.35, lambda: of(2, "full", "d2", "mean")),
        judge("not shared: slope of median value error", -0.2, 1.0, lambda: of(2, "none", "value_error", "median")),
        *(
            judge(
                f"{name}: slope of mean prediction error",
                -0.65,
                -0.4,
                lambda s=sharing: of(2, s, "prediction_error", "mean"),
            )
            for name, sharing in (("shared", "full"), ("not shared", "none"))
        ),
        judge("control without a redundant head: difference of D2 slopes", -0.1, 0.1, control),
    ]
