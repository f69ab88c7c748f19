"""Learning rates chosen on validation, with the same number of trials for all that will be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from hora_spec import HoraError

from hora_bench.data.base import Task
from hora_bench.request import Request
from hora_bench.run import Progress, results, silent
from hora_bench.store import RunResult, Trial

VALIDATED: Final[dict[str, Any]] = {"train_on": "train", "score_on": "val"}
Setting = tuple[float, float]  # learning rate, weight decay


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Rates that a search tries, and how it goes on from there.

    Attributes
    ----------
    rates
        Tried by every choice.
    factor
        By which the search goes beyond, where the best rate is the first or the last; 1 never goes on.
    refine
        So many rates are tried between the best and its neighbours, once it is inside.
    most
        So many rates are tried at most.
    """

    rates: Sequence[float]
    factor: float = 1.0
    refine: int = 0
    most: int = 12

    @classmethod
    def of(cls, given: Sequence[float] | Mapping[str, Any]) -> Self:
        """From a file: a list of rates, or a table ``{rates, factor, refine, most}``, whose factor is 2 when left out.

        Raises
        ------
        HoraError
            The rates are not different positive numbers, or there is no room to go on.
        """
        if not isinstance(given, Sequence | Mapping) or isinstance(given, str):
            raise HoraError(f"a search is a list of rates or a table, got {given!r}: write [1e-3, 2e-3]")
        table: dict[str, Any] = {"factor": 2.0, **given} if isinstance(given, Mapping) else {"rates": given}
        if unknown := sorted(set(table) - set(cls.__dataclass_fields__)):
            raise HoraError(f"a search has rates, factor, refine and most, got {', '.join(unknown)}: drop it")
        rates = table.get("rates")
        numbers = isinstance(rates, Sequence) and all(_number(rate) and rate > 0 for rate in rates)
        if not numbers or len(set(rates)) < len(rates):
            raise HoraError(f"rates of a search are different positive numbers, got {rates!r}: write [1e-3, 2e-3]")
        grid = cls(**table)
        sound = _number(grid.factor) and type(grid.refine) is type(grid.most) is int
        room = sound and grid.factor > 1 and grid.most > len(rates) > 1 and 0 <= grid.refine <= grid.most - len(rates)
        if isinstance(given, Mapping) and not room:
            raise HoraError(
                "a search that goes on starts with two rates or more, has a factor above 1 and tries more than it "
                f"starts with, got {dict(given)}: write {{ rates = [1e-3, 2e-3, 4e-3], factor = 2, most = 9 }}"
            )
        return grid


def search(
    asked: Sequence[Request], trials_at: Callable[[Request, float], list[Trial]], grid: Grid
) -> list[tuple[Request, list[Trial]]]:
    """The best rate of each of several requests that will be compared, after equally many trials.

    Parameters
    ----------
    asked
        Requests that differ in what is compared.
    trials_at
        Judges a request at a rate on validation, one trial a seed.
    grid
        Where to begin. As long as the best rate of any request is the first or last of those that it tried, and then
        `refine` times, every request tries one more: the next one outwards, or, where its best is inside, one between
        it and a neighbour. A rate that diverges is an end, too: beyond it lies nothing.

    Returns
    -------
    list of tuple
        Per request its copy at the best rate, and its trials. Ties go to the lower rate.

    Raises
    ------
    HoraError
        A request diverged at every rate.
    """
    tried = [[one for rate in sorted(grid.rates) for one in trials_at(request, rate)] for request in asked]
    refined = 0
    for _ in range(grid.most - len(grid.rates) if grid.factor > 1 else 0):
        if not any(_unbounded(trials) for trials in tried):
            if refined == grid.refine:
                break
            refined += 1
        for request, trials in zip(asked, tried, strict=True):
            trials += trials_at(request, next_rate(trials, grid.factor))
    return [(request.replace(learning_rate=best_of(own)[0]), own) for request, own in zip(asked, tried, strict=True)]


def next_rate(trials: Sequence[Trial], factor: float) -> float:
    """The rate to try next: outwards from a best one at an end, else between the best and its farther neighbour.

    Examples
    --------
    >>> tried = {1e-3: 50.0, 2e-3: 60.0}
    >>> shared = {"weight_decay": 0.0, "final_loss": None, "file": None}
    >>> next_rate([Trial(learning_rate=rate, accuracy_pct=found, **shared) for rate, found in tried.items()], 2)
    0.004
    """
    rates, means = sorted({trial.learning_rate for trial in trials}), means_of(trials)
    if not means:
        return _rounded(rates[0] / factor)
    place = rates.index(best_of(trials)[0])
    if place == 0:
        return _rounded(rates[0] / factor)
    if place == len(rates) - 1:
        return _rounded(rates[-1] * factor)
    low, best, high = rates[place - 1 : place + 2]
    return _rounded(sqrt(best * (high if high / best >= best / low else low)))


def means_of(trials: Sequence[Trial]) -> dict[Setting, float]:
    """Mean accuracy over seeds of each setting that diverged with none of them, in the order tried."""
    found: dict[Setting, list[float | None]] = {}
    for trial in trials:
        found.setdefault((trial.learning_rate, trial.weight_decay), []).append(trial.accuracy_pct)
    return {
        setting: float(np.mean([one for one in accuracies if one is not None]))
        for setting, accuracies in found.items()
        if None not in accuracies
    }


def best_of(trials: Sequence[Trial]) -> Setting:
    """Rate and decay with the highest mean; the lower ones of equals.

    Raises
    ------
    HoraError
        Every setting diverged.
    """
    means = means_of(trials)
    if not means:
        rates = ", ".join(f"{rate:g}" for rate in sorted({trial.learning_rate for trial in trials}))
        raise HoraError(f"one learning rate must converge, got none of {rates}: search lower ones (--tune-lr)")
    return max(sorted(means), key=lambda setting: means[setting])


def edge_of(trials: Sequence[Trial], rate: float) -> str | None:
    """``"lowest"`` or ``"highest"`` where the best rate is the last of the grid that way: a better may lie beyond."""
    rates = sorted({trial.learning_rate for trial in trials})
    if len(rates) < 2 or rate not in (rates[0], rates[-1]):
        return None
    return "lowest" if rate == rates[0] else "highest"


def tune(
    request: Request,
    task: Task,
    out: Path,
    *,
    grid: Sequence[Setting],
    command: str,
    progress: Progress = silent,
) -> tuple[Request, list[Trial]]:
    """Choose learning rate and weight decay on the validation split; the same grid for every method.

    Parameters
    ----------
    request, task, out, command, progress
        As for `hora_bench.run.run`; trials are kept in the folder ``trials`` of `out`.
    grid
        Learning rates and weight decays, in the order tried.

    Returns
    -------
    tuple
        The request with the best rates, to be trained on train and val together and tested once, and all trials.
        A setting that diverges counts as a trial without accuracy. Ties go to the lower rate.

    Raises
    ------
    HoraError
        Every setting diverged.
    """
    settings = [request.replace(learning_rate=rate, weight_decay=decay) for rate, decay in grid]
    judged = partial(trials_of, seeds=[request.seed], task=task, out=out, command=command, progress=progress)
    trials = [one for asked in settings for one in judged(asked)]
    rate, decay = best_of(trials)
    return request.replace(learning_rate=rate, weight_decay=decay), trials


def trials_of(
    asked: Request, seeds: Sequence[int], task: Task, out: Path, *, command: str, progress: Progress = silent
) -> list[Trial]:
    """A request judged on validation, a trial a seed; one that diverges has no accuracy.

    Parameters
    ----------
    asked, seeds, task, out, command, progress
        As for `hora_bench.run.results`; files go to the folder ``trials`` of `out`.
    """
    stage = f"lr {asked.learning_rate:g} wd {asked.weight_decay:g}: "
    found = results(
        asked.replace(**VALIDATED),
        seeds,
        task,
        out / "trials",
        command=command,
        progress=lambda kind, *rest: progress(stage + kind, *rest),
    )
    return [_trial(asked, seed, one) for seed, one in zip(seeds, found, strict=True)]


def _trial(asked: Request, seed: int, found: RunResult | None) -> Trial:
    rates = {"learning_rate": asked.learning_rate, "weight_decay": asked.weight_decay}
    if found is None:
        return Trial(**rates, seed=seed, accuracy_pct=None, final_loss=None, file=None)
    scores = found.scores
    return Trial(
        **rates,
        seed=seed,
        accuracy_pct=scores.accuracy_pct,
        loss=scores.loss,
        final_loss=found.loss[-1],
        file=f"trials/{found.name}.json",
    )


def _number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)


def _unbounded(trials: Sequence[Trial]) -> bool:
    return not means_of(trials) or edge_of(trials, best_of(trials)[0]) is not None


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
