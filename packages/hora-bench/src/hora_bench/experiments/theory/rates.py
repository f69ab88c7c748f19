"""Rates of recovery: fits at growing sample sizes, log-log slopes with bootstrap intervals, and gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from hora_bench.experiments.theory.identify import SPLITS, fit, identify, losses
from hora_bench.experiments.theory.model import (
    ACTIVATIONS,
    NOISE,
    SHARINGS,
    TOKENS,
    WIDTH,
    Problem,
    Sharing,
    count_params,
)
from hora_bench.store import Journal

LOSSES: Final = ("d2", "value_error", "query_error", "prediction_error")
BOOTSTRAP: Final = 2000
INTERVAL_PCT: Final = (2.5, 97.5)
TEST_SAMPLES: Final = 4000
DIGITS: Final = 6
UNREACHED: Final = 0.1
SIDES: Final[tuple[Sharing, Sharing]] = ("full", "none")
Pieces = Sequence[Mapping[str, Any]]

GATES: Final = (  # fitted heads, loss, bounds of the difference of slopes, shared less not shared
    ("a redundant head: D2 falls faster with sharing", 2, "d2", -np.inf, 0.0),
    ("a redundant head: the error of the value update falls faster with sharing", 2, "value_error", -np.inf, 0.0),
    ("a redundant head: the prediction error falls alike", 2, "prediction_error", -0.1, 0.1),
    ("no redundant head: D2 falls alike", 1, "d2", -0.1, 0.1),
)
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


ACTIVATED: Final = Grid(sizes=(100, 316, 1000, 3162, 10_000), trials=24, fitted_heads=(2,))
OF_ACTIVATIONS: Final = tuple(
    """\
With sharing A and B go through the activation, as those of the truth did; without, they are free, so that both hold \
the truth. The same problems and samples for both. A truth is drawn again while a vector of it is zero.
Where more than one fit in ten of either side ended above the truth's error, nothing is said: those are no \
least-squares estimates. \
Descents do not leave the flat side of relu.
Everything else as in the regression with its limits, which has the activation identity.\
""".splitlines()
)
GRIDS: Final[Mapping[str, Grid]] = {
    "quick": Grid(sizes=(100, 316, 1000), trials=6),
    "default": Grid(sizes=(100, 316, 1000, 3162, 10_000), trials=16),
    "full": Grid(sizes=(100, 316, 1000, 3162, 10_000, 31_623), trials=40, sharings=("full", "a", "b", "none")),
}


def measure(
    heads: int, sharing: Sharing, trial: int, *, sizes: tuple[int, ...], seed: int, activation: str = "identity"
) -> dict[str, Any]:
    """Losses of one trial at every sample size; the same problem and samples for every model.

    Returns
    -------
    dict
        One list per loss of ``LOSSES``, in the order of ``sizes``; ``starts`` and ``unreached`` fits, in total.
    """
    rng = np.random.default_rng([seed, trial])
    problem = Problem.draw(rng, activation)
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


def values_of(pieces: Pieces, heads: int, sharing: Sharing, key: str) -> np.ndarray:
    """What every trial has of a measure, in the order of the trials."""
    own = [piece for piece in pieces if (piece["fitted_heads"], piece["sharing"]) == (heads, sharing)]
    return np.array([piece[key] for piece in sorted(own, key=lambda piece: piece["trial"])])


def curves(grid: Grid, pieces: Pieces) -> list[dict[str, Any]]:
    """One record per fitted heads, sharing and loss, with what ``summarise`` returns."""
    return [
        {
            "fitted_heads": heads,
            "sharing": sharing,
            "loss": loss,
            **summarise(grid.sizes, values_of(pieces, heads, sharing, loss)),
        }
        for heads in grid.fitted_heads
        for sharing in grid.sharings
        for loss in LOSSES
    ]


def slope_difference(
    sizes: tuple[int, ...],
    shared: Float[np.ndarray, "trials sizes"],
    free: Float[np.ndarray, "trials sizes"],
    *,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Slope of the mean with sharing less that without, and its 95 % interval over resampled trials.

    Like with like: means with means, which is what the theorems bound, and each trial with itself, which is the same
    problem and the same samples.
    """
    trials = len(shared)
    draws = np.random.default_rng(seed).integers(trials, size=(BOOTSTRAP, trials))
    found = slope(sizes, shared.mean(axis=0)) - slope(sizes, free.mean(axis=0))
    resampled = slope(sizes, shared[draws].mean(axis=1)) - slope(sizes, free[draws].mean(axis=1))
    low, high = np.percentile(resampled, INTERVAL_PCT)
    return float(found), float(low), float(high)


def gates(sizes: tuple[int, ...], pieces: Pieces) -> list[dict[str, Any]]:
    """Whether sharing changes the rates as the theorems say, decided by whole intervals.

    Parameters
    ----------
    sizes
        Sample sizes.
    pieces
        Losses of every trial, as `theory` returns them.

    Returns
    -------
    list of dict
        ``gate``, ``difference`` of slopes with ``low`` and ``high``, the ``bounds`` it should keep, the share of fits
        with and without sharing that ended above the truth's error, ``unreached``, and ``outcome``: passed where the
        whole interval keeps the bounds, failed where none of it does, else not resolved; nor where more than one fit
        in ten of either side is no least-squares estimate, which says nothing of its rate.
    """
    judged, fitted = [], {piece["fitted_heads"] for piece in pieces}
    for name, heads, loss, low, high in (gate for gate in GATES if gate[1] in fitted):
        difference, *interval = slope_difference(sizes, *(values_of(pieces, heads, s, loss) for s in SIDES))
        kept = [low < bound < high for bound in interval]
        apart = interval[0] >= high or interval[1] <= low
        unreached = [float(values_of(pieces, heads, s, "unreached").mean()) / len(sizes) for s in SIDES]
        outcome = "passed" if all(kept) else "failed" if apart else "not resolved"
        outcome = outcome if max(unreached) <= UNREACHED else "not resolved"
        numbers = {"difference": difference, "low": interval[0], "high": interval[1], "unreached": unreached}
        judged.append({"gate": name, **numbers, "bounds": [low, high], "outcome": outcome})
    return judged


def trials(grid: Grid, activation: str, seed: int, journal: Journal) -> Iterator[dict[str, Any]]:
    """Losses of every trial of a grid; those that the journal has are not measured again."""
    for heads, sharing, trial in grid.pieces():
        which = {"fitted_heads": heads, "sharing": sharing, "trial": trial}
        how = {"sizes": grid.sizes, "seed": seed, "activation": activation}
        yield which | journal.once({**which, **how}, partial(measure, heads, sharing, trial, **how))


def theory(
    size: str = "default",
    *,
    seed: int = 0,
    journal: Journal | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Identification and rates of recovery, with gates and limits.

    Parameters
    ----------
    size
        ``"quick"`` (seconds, gates not judged), ``"default"`` (about a minute) or ``"full"`` (some 20 minutes; also
        the sharings "a" and "b").
    seed
        Problem, samples and starts of trial t follow from ``(seed, t)``.
    journal
        Keeps finished pieces; a run that finds its own there goes on from them.
    progress
        Called with pieces done and pieces in total.

    Returns
    -------
    dict
        ``setting``, ``identify`` (one record per sharing), ``pieces`` (losses of every trial), ``curves``,
        ``gates`` (empty when quick) and ``limits``.
    """
    grid = GRIDS[size]
    found, total = [], len(list(grid.pieces()))
    for piece in trials(grid, "identity", seed, journal or Journal(None)):
        found.append(piece)
        progress(len(found), total)
    return {
        "setting": {
            "size": size,
            "seed": seed,
            "sizes": list(grid.sizes),
            "trials": grid.trials,
            "width": WIDTH,
            "tokens": TOKENS,
            "noise": NOISE,
            "bootstrap": BOOTSTRAP,
            "params_count": {s: count_params(s, 2) for s in SHARINGS},
        },
        "identify": [
            {**asdict(found), "splits": list(SPLITS), "identified": found.identified}
            for found in (identify(sharing, seed=seed) for sharing in SHARINGS)
        ],
        "pieces": found,
        "curves": curves(grid, found),
        "gates": [] if size == "quick" else gates(grid.sizes, found),
        "limits": list(LIMITS),
    }


def activations(
    *,
    seed: int = 0,
    grid: Grid = ACTIVATED,
    journal: Journal | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Whether the rate survives an activation in the generator (the paper's third open question).

    Parameters
    ----------
    seed, journal, progress
        As for `theory`.
    grid
        Sizes, trials and sharings.

    Returns
    -------
    dict
        ``setting``; ``gates`` of each ``activation``; ``pieces``, losses of every trial; ``limits``.
    """
    pieces, total = [], len(ACTIVATIONS) * len(list(grid.pieces()))
    for name in ACTIVATIONS:
        for piece in trials(grid, name, seed, journal or Journal(None)):
            pieces.append({"activation": name, **piece})
            progress(len(pieces), total)
    return {
        "setting": {"seed": seed, "sizes": list(grid.sizes), "trials": grid.trials, "activations": list(ACTIVATIONS)},
        "gates": [
            {"activation": name, **gate}
            for name in ACTIVATIONS
            for gate in gates(grid.sizes, [piece for piece in pieces if piece["activation"] == name])
        ],
        "pieces": pieces,
        "limits": list(OF_ACTIVATIONS),
    }
