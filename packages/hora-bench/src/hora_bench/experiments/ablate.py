"""One factor at a time from the default: what each choice is worth on validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from hora_bench import runs
from hora_bench.experiments.intervals import mean_interval
from hora_bench.experiments.setting import SHUFFLED, Setting, vary

FACTORS: Final[Mapping[str, Sequence[Any]]] = {
    "sharing": ("a", "b", "none"),
    "residual": (True,),
    "a_source": ("hypernetwork",),
    "activation": ("tanh", "identity", "gelu", "relu", "sigmoid"),
    "gain": (1.0,),
    "normalize": (False,),
    "hidden_dim": (20, 80),
    "head_embed_dim": (20, 80),
    "alpha": (4.0, 16.0),
}
RATES: Final = (1e-3, 1e-2)
REFERENCES: Final = ("lora",)
NOTES: Final = (
    "Validation accuracy; the test split is not looked at. Differences inside the intervals are not findings.",
    "Everything else as in the first row, learning rate included: a choice that wants another rate looks worse here.",
    "Control: with shuffled labels the accuracy should be chance.",
)


def ablate(
    setting: Setting,
    out: Path,
    *,
    factors: Mapping[str, Sequence[Any]] = FACTORS,
    learning_rates: Sequence[float] = RATES,
    references: Sequence[str] = REFERENCES,
    seeds: Sequence[int] = (0,),
    command: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Change one factor of the default at a time.

    Parameters
    ----------
    setting
        Base request, of a HoRA method: the default; and data.
    out
        Folder of the runs' result files; runs found there are not repeated.
    factors
        Option of `hora_spec.AdapterSpec` to the values tried.
    learning_rates, references
        Rates tried, and other methods at the default's rate.
    seeds
        Of every trial.
    command, progress
        Recorded in the runs' files, and a callback with runs done and in total.

    Returns
    -------
    dict
        ``setting``; ``rows``, per choice its factor, value and accuracy with interval and difference from the default;
        ``notes``.
    """
    base = setting.base
    choices = [("default", None, base)]
    choices += [("method", name, vary(base, method=name, options={})) for name in references]
    for factor, values in factors.items():
        choices += [(factor, value, vary(base, options={**base.options, factor: value})) for value in values]
    choices += [("learning_rate", rate, vary(base, learning_rate=rate)) for rate in learning_rates]
    choices += [("labels", "shuffled", vary(base, task=base.task + SHUFFLED))]

    rows, done = [], 0
    tasks = {asked.task: setting.load(asked.task) for _, _, asked in choices}
    for factor, value, asked in choices:
        found = []
        for seed in seeds:
            found.append(runs.run(vary(asked, seed=seed), tasks[asked.task], out, command=command))
            done += 1
            progress(done, len(choices) * len(seeds))
        accuracies = [result.scores.accuracy_pct for result in found]
        rows.append(
            {
                "factor": factor,
                "value": value,
                **mean_interval(accuracies, found[0].scores.total_count),
                "loss": round(float(np.mean([result.loss[-10:] for result in found])), 5),
                "params_count": found[0].trained_params_count,
                "accuracies_pct": accuracies,
            }
        )
    for row in rows:
        row["difference_pct"] = round(row["mean_pct"] - rows[0]["mean_pct"], 2)
    return {
        "setting": {**base.model_dump(), "seeds": list(seeds)},
        "rows": rows,
        "notes": list(NOTES),
    }
