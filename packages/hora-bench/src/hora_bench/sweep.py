"""The one engine of comparisons: choices that differ in something, alike in all else, with paired differences.

A file says what differs. Ablations, curves over fractions of the data, tuned comparisons and controls are such files.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from hora_spec import HoraError

from hora_bench.data.catalog import SHUFFLED, load_task
from hora_bench.request import FINAL, Request, request, vary
from hora_bench.run import edge_of, run, tune
from hora_bench.seeds import seeds_of
from hora_bench.stats import Difference, chance_bound, mean_interval
from hora_bench.store import RunResult, Trial

QUICK: Final[dict[str, Any]] = {"image_size_px": 28, "steps": 10, "warmup_steps": 1, "limit": 100}
REFERENCE: Final = "lora"
AT_ONE_RATE: Final = """\
Validation accuracy; the test split is not looked at. Everything else as in the first row, learning rate included: a \
choice that wants another rate looks worse here.\
"""
AT_OWN_RATES: Final = """\
Every choice takes its learning rate from one search on validation; it is judged once per seed on the test split, \
after training on training and validation examples. Labels of validation that a search looked at count as used.
A best rate at the grid's edge is marked: a better one may lie beyond, and the comparison decides nothing.\
"""
PAIRED: Final = """\
Differences are paired: equal seeds mean equal subset and order of the data. Their 95 % intervals are Student's t over \
the seeds, absent for one seed; an interval that holds 0 is no finding, and one in twenty that does not is luck.
The difference from LoRA is from LoRA under otherwise equal circumstances: as many steps, as much data.
The detectable difference is what so many seeds would have shown in four of five such experiments.\
"""
CONTROL: Final = """\
Control, on validation: with shuffled labels guessing stays below the bound 999 times in 1000 (binomial).\
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """The request that every run starts from, what is varied, and where data lies.

    Attributes
    ----------
    base
        Request before anything is varied.
    vary
        Fields of `Sweep`, or arguments of an experiment that is none.
    data
        Folder of tasks; what comes with packages needs none.
    """

    base: Request
    vary: dict[str, Any] = field(default_factory=dict)
    data: Path | None = None

    def load(self, task: str) -> Any:
        """A task by name, as the base request wants it."""
        asked = self.base
        scoring = None if asked.scoring == "accuracy" else asked.scoring
        data = None if task.removesuffix(SHUFFLED) in ("digits", "fashion-mnist") else self.data
        return load_task(
            task, model=asked.model, data=data, image_size=asked.image_size_px, scoring=scoring, limit=asked.limit
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What is compared: the table ``[vary]`` of a file.

    Attributes
    ----------
    methods, references
        Methods beside the base request's; with `methods` the base request's own is left out.
    factors
        What is changed one at a time, a field of the request or an option of the method, to the values tried.
    variants
        Name to several such changes at once.
    tasks, fractions
        All of that on each of these tasks, with each of these shares of the data.
    learning_rates
        Rates tried as one more factor.
    search
        Rates among which every choice finds its own on validation, to be judged on the test split. Empty: all have the
        base request's rate and are judged on validation.
    seeds, search_seeds
        Of every choice, and those that search; default the first.
    controls
        Backend to methods that are also trained on shuffled labels.
    """

    methods: Sequence[str] = ()
    references: Sequence[str] = ()
    factors: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tasks: Sequence[str] = ()
    fractions: Sequence[float] = ()
    learning_rates: Sequence[float] = ()
    search: Sequence[float] = ()
    seeds: Sequence[int] = (0,)
    search_seeds: Sequence[int] = ()
    controls: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, vary: Mapping[str, Any]) -> Sweep:
        """From the table of a file; curves over fractions name the rates that they search ``learning_rates``.

        Raises
        ------
        HoraError
            The table has another entry.
        """
        if unknown := sorted(set(vary) - set(cls.__dataclass_fields__)):
            known = ", ".join(cls.__dataclass_fields__)
            raise HoraError(f"what is varied is among {known}, got {', '.join(unknown)}: see the guide on experiments")
        fields = dict(vary)
        if "fractions" in fields and "search" not in fields:
            fields["search"] = fields.pop("learning_rates", ())
        fields["seeds"] = seeds_of(fields.get("seeds", (0,)))
        return cls(**fields)


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


def sweep(
    setting: Setting,
    out: Path,
    asked: Sweep,
    *,
    command: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Run every choice with every seed and compare.

    Parameters
    ----------
    setting
        Base request and data.
    out
        Folder of the runs' result files; runs found there are not repeated.
    asked
        What is compared.
    command, progress
        Recorded in the runs' files, and a callback with choices done and in total.

    Returns
    -------
    dict
        ``setting``; ``rows``, per choice its accuracy with interval, and paired differences from the first and from
        LoRA; ``search``, every rate tried; ``controls``; ``notes``.
    """
    chosen = [*_choices(setting.base, asked)]
    tasks = {name: setting.load(name) for name in dict.fromkeys(choice.request.task for choice in chosen)}
    rows, tried = [], []
    for done, choice in enumerate(chosen, 1):
        found, trials = _runs(choice.request, tasks[choice.request.task], out, asked, command)
        which = {"task": choice.request.task, "factor": choice.factor, "value": choice.value}
        which["fraction"] = choice.request.fraction
        rows.append({**which, **_outcome(found, trials)})
        tried += [{**which, **trial.model_dump(exclude={"file"})} for trial in trials]
        progress(done, len(chosen))
    _compare(chosen, rows)
    checked = control(setting, out, asked.controls, seed=asked.seeds[0], command=command)
    notes = (AT_OWN_RATES if asked.search else AT_ONE_RATE, PAIRED, *[CONTROL] * bool(checked))
    return {
        "setting": {**chosen[0].request.model_dump(), "seeds": list(asked.seeds)},
        "rows": rows,
        "search": tried,
        "controls": checked,
        "notes": [line for note in notes for line in note.splitlines()],
    }


def _choices(base: Request, asked: Sweep) -> Iterator[Choice]:
    """Everything that is compared, on every task and fraction."""
    changes: list[tuple[str, Any, dict[str, Any]]] = [] if asked.methods else [("default", None, {})]
    changes += [("method", name, {"method": name}) for name in (*asked.methods, *asked.references)]
    factors = {**asked.factors, **({"learning_rate": asked.learning_rates} if asked.learning_rates else {})}
    changes += [(factor, value, {factor: value}) for factor, values in factors.items() for value in values]
    changes += [("variant", name, dict(values)) for name, values in asked.variants.items()]
    for task in asked.tasks or (base.task,):
        for fraction in asked.fractions or (base.fraction,):
            here = {"task": task, "fraction": fraction}
            yield from (Choice(factor, value, vary(base, **{**here, **own})) for factor, value, own in changes)


def _runs(asked: Request, task: Any, out: Path, sweep: Sweep, command: str) -> tuple[list[RunResult], list[Trial]]:
    """One result per seed, at the best rate of the search if there is one, and its trials."""
    if not sweep.search:
        return [run(vary(asked, seed=seed), task, out, command=command) for seed in sweep.seeds], []
    best, trials = tune(
        asked,
        task,
        out,
        learning_rates=sweep.search,
        weight_decays=(asked.weight_decay,),
        seeds=sweep.search_seeds or sweep.seeds[:1],
        command=command,
    )
    final = [vary(best, seed=seed, **FINAL) for seed in sweep.seeds]
    return [run(one, task, out, command=command, trials=trials) for one in final], trials


def _outcome(found: Sequence[RunResult], trials: Sequence[Trial]) -> dict[str, Any]:
    first = found[0]
    accuracies = [result.scores.accuracy_pct for result in found]
    losses = [result.scores.loss for result in found if result.scores.loss is not None]
    return {
        "steps": first.request.steps,
        "learning_rate": first.request.learning_rate,
        "rate_at_edge": edge_of(trials, first.request.learning_rate),
        **mean_interval(accuracies, first.scores.total_count),
        "test_loss": round(float(np.mean(losses)), 4),
        "loss": round(float(np.mean([result.loss[-10:] for result in found])), 5),
        "params_count": first.trained_params_count,
        "labels_count": max(result.labels_count or 0 for result in found),
        "accuracies_pct": accuracies,
    }


def _compare(chosen: Sequence[Choice], rows: list[dict[str, Any]]) -> None:
    """Add paired differences from the first row of the same task and fraction, and from LoRA in equal circumstances."""
    first: dict[tuple[str, float], dict[str, Any]] = {}
    lora: dict[str, dict[str, Any]] = {}
    for choice, row in zip(chosen, rows, strict=True):
        first.setdefault((row["task"], row["fraction"]), row)
        if choice.request.method == REFERENCE:
            lora.setdefault(choice.circumstances, row)
    for choice, row in zip(chosen, rows, strict=True):
        compared = {"default": first[row["task"], row["fraction"]], "lora": lora.get(choice.circumstances)}
        for name, reference in compared.items():
            if reference is not None:
                found = asdict(Difference.of(row["accuracies_pct"], reference["accuracies_pct"]))
                row[f"over_{name}_pct"] = {f"{key}_pct": found[key] for key in ("mean", "low", "high", "detectable")}


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
    for backend, method in ((backend, method) for backend, names in methods.items() for method in names):
        asked = vary(setting.base, method=method, backend=backend, seed=seed)
        accuracy, by_chance = (
            run(vary(asked, task=name), task, out, command=command).scores.accuracy_pct
            for name, task in ((asked.task, plain), (asked.task + SHUFFLED, shuffled))
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


def read_setting(path: Path | None, *, quick: dict[str, Any] | None, data: Path | None) -> Setting:
    """The setting of an experiment file, or the quick one on the embedded digits.

    Parameters
    ----------
    path
        TOML: a table ``[request]`` with fields of a request, a table ``[vary]``.
    quick
        What the quick setting varies, where it is asked for in place of a file.
    data
        Folder of tasks.

    Raises
    ------
    HoraError
        Neither or both are given, or the file is no TOML or has other tables, or the request other fields.
    """
    if (path is None) == (quick is None):
        given = "neither" if path is None else "both"
        raise HoraError(f"an experiment takes a file (experiments/*.toml) or --quick, got {given}: pass one of them")
    if path is None:
        return Setting(request(**QUICK), dict(quick or {}), data)
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise HoraError(f"an experiment file is TOML, got {error} in {path.name}: fix the file") from error
    known = Request.model_fields
    unknown = sorted({*content} - {"request", "vary"} | {*content.get("request", {})} - {*known})
    if unknown:
        raise HoraError(
            f"an experiment file has [request], with fields among {', '.join(known)}, and [vary], got {unknown} in "
            f"{path.name}"
        )
    return Setting(request(**content.get("request", {})), content.get("vary", {}), data)
