"""The control that every accuracy needs: with shuffled labels it must be chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy import stats

from hora_bench import runs
from hora_bench.experiments.setting import SHUFFLED, Setting, vary

LEVEL: Final = 0.999


def chance_bound(labels: np.ndarray, *, level: float = LEVEL) -> float:
    """Accuracy in percent that guessing stays below with probability `level`, whatever is guessed.

    Labels that are permuted without regard to the images make the number of right answers hypergeometric in each
    class; the binomial of the most frequent class bounds it (Hoeffding 1963, sampling without replacement).

    Examples
    --------
    >>> round(chance_bound(np.arange(10).repeat(20)), 2)
    17.0
    """
    share = np.bincount(labels).max() / len(labels)
    return 100 * float(stats.binom.ppf(level, len(labels), share)) / len(labels)


def control(
    setting: Setting, out: Path, methods: Mapping[str, Sequence[str]], *, seed: int = 0, command: str = ""
) -> list[dict[str, Any]]:
    """Train each method twice alike, once on labels that are permuted, and judge both on validation.

    Parameters
    ----------
    setting
        Base request and data. Validation labels are permuted too: were they not, a model that gives similar images one
        wrong label would scatter far more than guessing does.
    out
        Folder of the runs' result files; runs found there are not repeated.
    methods
        Backend to names of methods.
    seed, command
        Of the runs.

    Returns
    -------
    list of dict
        Per backend and method both accuracies, the bound of guessing, and whether shuffled labels stay below it.
    """
    name = setting.base.task
    plain, shuffled = setting.load(name), setting.load(name + SHUFFLED)
    bound, rows = chance_bound(shuffled.labels("val")), []
    for backend, method in ((backend, method) for backend, names in methods.items() for method in names):
        asked = vary(setting.base, method=method, backend=backend, seed=seed)
        accuracy, by_chance = (
            runs.run(vary(asked, task=task.name), task, out, command=command).scores.accuracy_pct
            for task in (plain, shuffled)
        )
        rows.append(
            {
                "backend": backend,
                "method": method,
                "accuracy_pct": round(accuracy, 2),
                "shuffled_pct": round(by_chance, 2),
                "chance_bound_pct": round(bound, 2),
                "at_chance": by_chance <= bound,
            }
        )
    return rows
