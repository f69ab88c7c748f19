"""A control: methods trained on labels that are permuted, which none may learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from hora_bench.choices import feasible
from hora_bench.data.catalog import SHUFFLED
from hora_bench.request import Request, vary
from hora_bench.run import run
from hora_bench.setting import Setting
from hora_bench.stats import chance_bound

CONTROL: Final = (
    "Control, on validation: with shuffled labels guessing stays below the bound 999 times in 1000 (binomial)."
)


def controlled(base: Request, methods: Mapping[str, Sequence[str]]) -> list[Request]:
    """The base request with each method on each backend."""
    return [feasible(base, method=method, backend=backend) for backend, names in methods.items() for method in names]


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
    if not methods:
        return []
    plain, shuffled = setting.load(setting.base.task), setting.load(setting.base.task + SHUFFLED)
    bound, rows = chance_bound(shuffled.labels("val")), []
    for asked in controlled(setting.base, methods):
        asked = asked.replace(seed=seed)
        accuracy, by_chance = (
            run(vary(asked, task=name), task, out, command=command).scores.accuracy_pct
            for name, task in ((asked.task, plain), (asked.task + SHUFFLED, shuffled))
        )
        rows.append(
            {
                "backend": asked.backend,
                "method": asked.method,
                "accuracy_pct": round(accuracy, 2),
                "shuffled_pct": round(by_chance, 2),
                "chance_bound_pct": round(bound, 2),
                "at_chance": by_chance <= bound,
            }
        )
    return rows
