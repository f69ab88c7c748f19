"""The protocol of every tuned comparison: search on validation with one seed, then test once with each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hora_bench import runs
from hora_bench.experiments.setting import FINAL, vary
from hora_bench.results import Request, RunResult, Trial
from hora_bench.tasks.base import Task


def tuned(
    asked: Request, task: Task, out: Path, *, learning_rates: Sequence[float], seeds: Sequence[int], command: str
) -> tuple[list[RunResult], list[Trial]]:
    """Choose the learning rate, train on training and validation examples together, and judge the test split.

    Parameters
    ----------
    asked, task
        What is tuned on which data.
    out
        Folder of the runs' result files; runs found there are not repeated.
    learning_rates
        The search, the same for everything that is compared.
    seeds
        The first tunes; each draws a subset and an order of its own, the same for everything that is compared.
    command
        Recorded in the runs' files.

    Returns
    -------
    tuple
        One result per seed at the best rate, and the trials of the search.
    """
    best, trials = runs.tune(
        vary(asked, seed=seeds[0]),
        task,
        out,
        learning_rates=tuple(learning_rates),
        weight_decays=(asked.weight_decay,),
        command=command,
    )
    return [runs.run(vary(best, seed=seed, **FINAL), task, out, command=command) for seed in seeds], trials
