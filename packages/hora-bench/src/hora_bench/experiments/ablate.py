"""One factor at a time from the default: what each choice is worth, at one learning rate or each at its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure

from hora_bench import runs
from hora_bench.experiments.control import control
from hora_bench.experiments.intervals import mean_interval, paired_interval
from hora_bench.experiments.setting import Setting, vary
from hora_bench.experiments.svg import save
from hora_bench.experiments.tuned import tuned
from hora_bench.results import Request, RunResult

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
AT_ONE_RATE: Final = """\
Validation accuracy; the test split is not looked at. Differences inside the intervals are not findings.
Everything else as in the first row, learning rate included: a choice that wants another rate looks worse here.\
"""
AT_OWN_RATES: Final = """\
Every choice takes its learning rate from one search on validation, with the first seed; it is judged once per seed on \
the test split, after training on training and validation examples.
Intervals of accuracies: answers of the test split (Wilson), and scatter between seeds.\
"""
PAIRED: Final = """\
Differences are paired: equal seeds mean equal subset and order of the data. Their 95 % intervals are Student's t over \
the seeds, absent for one seed; an interval that holds 0 is no finding, and one in twenty that does not is luck.
The difference from LoRA is from LoRA under otherwise equal circumstances: as many steps, as much data.\
"""
CONTROL: Final = """\
Control, on validation: with shuffled labels guessing stays below the bound 999 times in 1000 (binomial).\
"""


@dataclass(frozen=True, slots=True)
class Choice:
    """A row: what is changed, to which value, and the request that this makes."""

    factor: str
    value: Any
    request: Request

    @property
    def circumstances(self) -> str:
        """The request but for the method and its rate: choices that agree here may be compared."""
        return self.request.model_dump_json(exclude={"method", "options", "learning_rate"})


def ablate(
    setting: Setting,
    out: Path,
    *,
    factors: Mapping[str, Sequence[Any]] = FACTORS,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    references: Sequence[str] = REFERENCES,
    learning_rates: Sequence[float] = RATES,
    search: Sequence[float] = (),
    seeds: Sequence[int] = (0,),
    controls: Mapping[str, Sequence[str]] | None = None,
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
        What `hora_bench.experiments.setting.vary` changes, an option of the method or a field of the request, to the
        values tried.
    variants
        Name to several such changes at once.
    references
        Other methods.
    learning_rates
        Rates tried as one more factor, without `search`.
    search
        Rates among which every choice finds its own on validation, to be judged on the test split. Empty: all have the
        default's rate and are judged on validation.
    seeds
        Of every choice; the first searches.
    controls
        Backend to methods that are also trained on shuffled labels; default the default.
    command, progress
        Recorded in the runs' files, and a callback with choices done and in total.

    Returns
    -------
    dict
        ``setting``; ``rows``, per choice its accuracy with interval, and paired differences from the default and from
        LoRA; ``search``, every rate tried; ``controls``; ``notes``.
    """
    factors = {"method": references, **factors} | ({} if search else {"learning_rate": learning_rates})
    chosen = _choices(setting.base, factors, variants or {})
    tasks = {name: setting.load(name) for name in {choice.request.task for choice in chosen}}
    rows, tried = [], []
    for done, choice in enumerate(chosen, 1):
        asked, task, trials = choice.request, tasks[choice.request.task], []
        if search:
            found, trials = tuned(asked, task, out, learning_rates=search, seeds=seeds, command=command)
        else:
            found = [runs.run(vary(asked, seed=seed), task, out, command=command) for seed in seeds]
        which = {"factor": choice.factor, "value": choice.value}
        rows.append({**which, **_outcome(found)})
        tried += [{**which, **trial.model_dump(exclude={"file"})} for trial in trials]
        progress(done, len(chosen))
    _compare(chosen, rows)
    controls = {setting.base.backend: [setting.base.method]} if controls is None else controls
    checked = control(setting, out, controls, seed=seeds[0], command=command)
    notes = (AT_OWN_RATES if search else AT_ONE_RATE, PAIRED, *[CONTROL] * bool(checked))
    return {
        "setting": {**chosen[0].request.model_dump(), "seeds": list(seeds)},
        "rows": rows,
        "search": tried,
        "controls": checked,
        "notes": [line for note in notes for line in note.splitlines()],
    }


def _choices(
    base: Request, factors: Mapping[str, Sequence[Any]], variants: Mapping[str, Mapping[str, Any]]
) -> list[Choice]:
    """The default and everything that is compared with it."""
    asked = [("default", None, {})]
    asked += [(factor, value, {factor: value}) for factor, values in factors.items() for value in values]
    asked += [("variant", name, dict(changes)) for name, changes in variants.items()]
    return [Choice(factor, value, vary(base, **changes)) for factor, value, changes in asked]


def _outcome(found: Sequence[RunResult]) -> dict[str, Any]:
    first = found[0]
    accuracies = [result.scores.accuracy_pct for result in found]
    return {
        "steps": first.request.steps,
        "learning_rate": first.request.learning_rate,
        **mean_interval(accuracies, first.scores.total_count),
        "loss": round(float(np.mean([result.loss[-10:] for result in found])), 5),
        "params_count": first.trained_params_count,
        "accuracies_pct": accuracies,
    }


def _compare(chosen: Sequence[Choice], rows: list[dict[str, Any]]) -> None:
    """Add the paired differences of each row from the first, and from LoRA where it ran under equal circumstances."""
    lora: dict[str, Any] = {}
    for choice, row in zip(chosen, rows, strict=True):
        if choice.request.method == "lora":
            lora.setdefault(choice.circumstances, row)
    for choice, row in zip(chosen, rows, strict=True):
        for name, reference in (("default", rows[0]), ("lora", lora.get(choice.circumstances))):
            if reference is not None:
                row[f"over_{name}_pct"] = paired_interval(row["accuracies_pct"], reference["accuracies_pct"])


def plot(result: dict[str, Any], path: Path) -> None:
    """Write accuracy and, where there are any, paired differences from LoRA, a choice per line, as SVG."""
    rows = result["rows"]
    paired = [row for row in rows if row.get("over_lora_pct", {}).get("low_pct") is not None]
    figure = Figure(figsize=(4.5 * (1 + bool(paired)), 1 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 1 + bool(paired), squeeze=False, sharey=True)[0]
    names = [row["factor"] if row["value"] is None else f"{row['factor']} {row['value']}" for row in rows]
    axes[0].set_yticks(range(len(rows)), names, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("accuracy, %")
    _bars(axes[0], list(enumerate(rows)))
    if paired:
        axes[1].axvline(0, color="0.6", linewidth=0.8)
        axes[1].set_xlabel("difference from LoRA, points")
        _bars(axes[1], [(rows.index(row), row["over_lora_pct"]) for row in paired])
    save(figure, path)


def _bars(axis: Any, found: list[tuple[int, dict[str, float]]]) -> None:
    """Means and intervals at their lines."""
    lines, means = [line for line, _ in found], [one["mean_pct"] for _, one in found]
    errors = [
        [one["mean_pct"] - one["low_pct"] for _, one in found],
        [one["high_pct"] - one["mean_pct"] for _, one in found],
    ]
    axis.errorbar(means, lines, xerr=errors, fmt="o", markersize=4, capsize=2)
