"""Accuracy at every rate of a grid, the range of good ones, and the curvature where training starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from hora_spec import HoraError
from pydantic import Field

from hora_bench import methods as known
from hora_bench.choices import Choice, Sweep, choices, lora_of
from hora_bench.request import Inputs, Request
from hora_bench.search import VALIDATED, trials_of
from hora_bench.setting import Setting
from hora_bench.stats import LEVEL, MARGIN, Difference, chance_bound
from hora_bench.store import Journal, Trial
from hora_bench.versions import sources_sha256

from .explain import EXPLAINS, LUCK, explained
from .sharpness import ADAPTER, KINDS, sharpness
from .widths import DRAWS, Range, bounds, cut, draws_of, range_of

LOST: Final = 2  # rates in a row at which every seed is at chance: none above is run
FEWEST: Final = 4  # rates of a curve
Counts = np.ndarray
RATES: Final = {"high": "the upper end of the range", "fall": "the rate from which on accuracy is lost"}
REGISTERED: Final = (ADAPTER, "high")
NOTES: Final = """\
{proxy}. It says nothing of a full run.
Accuracy is that of validation; no label of the test split is used. Training sees its fraction of the training split.
The range: rates whose accuracy is within {margin:g} of the best, on a curve that rises to one peak and falls, fitted \
to the means of {seeds} seeds by least squares, linear between rates. The best is chosen without the seed that values \
it: the mean at the best of many rates is too high by luck, and a range below it too narrow. Where a range ends with \
the grid, its width is a lower bound.
Intervals: {level:g} %, percentiles of {draws} resamplings of the seeds, the same for all choices, so that \
differences are paired. Where more than {tail:g} % of them end with the grid, the interval does, too, and is marked.
Wider and narrower are those of the whole interval of the ratio to LoRA's width; equal is within a grid step, \
{step:.3g} times, either way. Nothing else is said of a range that ends with the grid than what its true width leaves \
certain.
No rate is run above {lost} in a row at which no seed is above chance. A run whose loss is not finite counts as \
guessing.
Eigenvalues: the largest of the Hessian of the loss of all training examples of a seed, of {hessian_seeds} seeds, to \
1 %. At the start, B is 0 for LoRA and for generated B: then A has no curvature of its own, and the eigenvalue is \
that of B and of its products with A. The head's curvature, which all methods share, is most of that of all trained \
values. In AdamW's units it is measured after the warm-up at {lowest:g}, the lowest rate: at the first step AdamW \
divides by the gradient itself, which is 0 for A, and eps would decide.
Explained: Spearman's rank correlation over choices, its mean over tasks, with the interval of other seeds. It \
explains where the whole interval is below {gate:g} and at most {luck:g} of all orders of the choices give as low a \
value; it does not where the whole interval is above {gate:g}; else it is not resolved. Registered before any result: \
the adapter's eigenvalue at the start, for the upper end of the range. The others are looked at beside.
It is not judged seed by seed: a single seed's range, from validation examples that few, is mostly chance.\
"""


@dataclass(slots=True)
class Measured:
    """A choice on a task: its trials, its seeds' eigenvalues, and the range over the whole and over resamplings."""

    choice: Choice
    trials: list[list[Trial]]
    eigenvalues: list[dict[str, float]]
    guessing: float
    bound: float
    found: Range
    drawn: list[Range]

    @property
    def open_low(self) -> bool:
        """Whether the lower end, or that of its interval, is the grid's."""
        return self.found.open_low or cut(np.array([one.open_low for one in self.drawn]))

    @property
    def open_high(self) -> bool:
        """Whether the upper end, or that of its interval, is the grid's."""
        return self.found.open_high or cut(np.array([one.open_high for one in self.drawn]))


def rates(
    setting: Setting,
    out: Path,
    *,
    methods: Sequence[str] = (),
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    tasks: Sequence[str] = (),
    rates: Sequence[Annotated[float, Field(gt=0)]],
    seeds: Annotated[Sequence[int], Field(min_length=2)],
    hessian_seeds: Annotated[int, Field(ge=1)] = 2,
    margin: Annotated[float, Field(gt=0, lt=100)] = MARGIN,
    fall: Annotated[float, Field(gt=0, lt=100)] = 10.0,
    command: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure every choice at every rate with every seed, and its curvature.

    Parameters
    ----------
    setting
        Base request, a screen, and data.
    out
        Folder of the runs' files; what is there is not repeated, eigenvalues included.
    methods, variants, tasks
        What is compared, as in a comparison; LoRA, to which widths are compared, may be among it.
    rates
        The grid, rising.
    seeds
        Of every run.
    hessian_seeds
        So many of the first seeds have their curvature measured.
    margin, fall
        Points below the best: of the range, and of the rate from which on accuracy is lost.
    command, progress
        Recorded in the runs' files, and a callback with pieces done and in total.

    Returns
    -------
    dict
        ``setting``; ``rows``, the range of each choice with its interval and the word for its width beside LoRA's;
        ``curves``, every rate; ``eigenvalues``, every seed; ``explained``; ``notes``.

    Raises
    ------
    HoraError
        The request is no screen or has a seed or a rate of its own that would change nothing, the grid does not rise,
        or a choice trains nothing but the head.
    """
    base = setting.base
    _check(base, rates, seeds, hessian_seeds, margin, fall)
    asked = Sweep(methods=methods, variants=variants or {}, tasks=tasks, seeds=seeds, margin=margin)
    chosen = [*choices(base, asked)]
    if idle := sorted({one.request.method for one in chosen if known.find(one.request.method).family == "probe"}):
        raise HoraError(f"curvature is that of an adapter, got {', '.join(idle)}, which has none: leave it out")
    loaded = {name: setting.load(name) for name in dict.fromkeys(one.request.task for one in chosen)}
    pieces, draws = len(rates) + hessian_seeds, draws_of(len(seeds))
    measured: list[Measured] = []
    for place, choice in enumerate(chosen):
        task = loaded[choice.request.task]

        def done(count: int, place: int = place) -> None:
            progress(place * pieces + count, len(chosen) * pieces)

        lines = _curve(choice.request, task, rates, seeds, out, command, done)
        found = _eigenvalues(choice.request, task, min(rates), seeds[:hessian_seeds], out, done, pieces)
        measured.append(_measured(choice, task, lines, found, rates, (margin, fall), draws))
    step = float(np.log2(np.divide(rates[1:], rates[:-1])).max())
    return {
        "setting": {
            **base.model_dump(),
            "methods": list(methods),
            "variants": {name: dict(changes) for name, changes in (variants or {}).items()},
            "tasks": list(tasks) or [base.task],
            "rates": list(rates),
            "seeds": list(seeds),
            "hessian_seeds": hessian_seeds,
            "margin": margin,
            "fall": fall,
        },
        "rows": [_row(one, _lora(one, measured, chosen), step) for one in measured],
        "curves": [line for one in measured for line in _lines(one, rates)],
        "eigenvalues": [
            {**_which(one.choice), "seed": seed, **{kind: float(f"{value:.4g}") for kind, value in values.items()}}
            for one in measured
            for seed, values in zip(seeds, one.eigenvalues, strict=False)
        ],
        "explained": _explanations(measured),
        "notes": NOTES.format(
            proxy=f"{base.proxy[0].upper()}{base.proxy[1:]}",
            margin=margin,
            seeds=len(seeds),
            level=100 * LEVEL,
            draws=DRAWS,
            tail=50 * (1 - LEVEL),
            step=2**step,
            lost=LOST,
            hessian_seeds=hessian_seeds,
            lowest=min(rates),
            gate=EXPLAINS,
            luck=LUCK,
        ).splitlines(),
    }


def _check(
    base: Request, rates: Sequence[float], seeds: Sequence[int], hessian_seeds: int, margin: float, fall: float
) -> None:
    if base.last_blocks is None:
        raise HoraError(
            "ranges of rates are measured on a screen, got no last_blocks in [request]: add last_blocks = 4"
        )
    if base.seed:
        raise HoraError(f"seeds of a curve are in [vary], got seed {base.seed} in [request]: move it")
    if len(rates) < FEWEST or list(rates) != sorted(set(rates)) or not np.isfinite(rates).all():
        raise HoraError(f"a grid has {FEWEST} rates or more that rise, got {list(rates)}: write [1e-3, 1.5e-3, ...]")
    if hessian_seeds > len(seeds):
        raise HoraError(
            f"curvature is that of some of the {len(seeds)} seeds, got {hessian_seeds}: lower hessian_seeds"
        )
    if fall <= margin:
        raise HoraError(f"what is lost is more than the margin of {margin:g}, got fall {fall:g}: raise it")


def _curve(
    asked: Request,
    task: Any,
    rates: Sequence[float],
    seeds: Sequence[int],
    out: Path,
    command: str,
    done: Callable[[int], None],
) -> list[list[Trial]]:
    """Trials of each rate from the lowest, up to where no seed is above chance any more."""
    bound, found = chance_bound(task.labels("val")), []
    for count, rate in enumerate(rates, 1):
        found.append(trials_of(asked.replace(learning_rate=rate), seeds, task, out, command=command))
        done(count)
        last = [one.accuracy_pct or 0.0 for trials in found[-LOST:] for one in trials]
        if len(found) >= max(LOST, FEWEST) and max(last) <= bound:
            break
    return found


def _eigenvalues(
    asked: Request,
    task: Any,
    rate: float,
    seeds: Sequence[int],
    out: Path,
    done: Callable[[int], None],
    pieces: int,
) -> list[dict[str, float]]:
    """Of each seed, kept in a file of the task's beside the runs: pieces of several tasks may run at the same time."""
    code = sources_sha256(Path(__file__).with_name("sharpness.py"))
    kept, found = Journal(out / f"sharpness-{task.name.replace('/', '-')}.jsonl", code), []
    for count, seed in enumerate(seeds, 1):
        one = asked.replace(learning_rate=rate, seed=seed, **VALIDATED)
        inputs = Inputs.of(one, task)
        key = [one.model_dump(), inputs.model_dump()]
        found.append(kept.once(key, lambda one=one, inputs=inputs: sharpness(one, task, inputs)))
        done(pieces - len(seeds) + count)
    return found


def _measured(
    choice: Choice,
    task: Any,
    trials: list[list[Trial]],
    eigenvalues: list[dict[str, float]],
    rates: Sequence[float],
    margins: tuple[float, float],
    draws: Counts,
) -> Measured:
    labels = task.labels("val")
    guessing = 100 * float(np.unique(labels, return_counts=True)[1].max()) / len(labels)
    accuracies = np.array([[guessing if t.accuracy_pct is None else t.accuracy_pct for t in at] for at in trials]).T
    tried, (margin, fall) = rates[: len(trials)], margins
    whole = range_of(accuracies, tried, margin=margin, fall=fall)
    drawn = [range_of(accuracies, tried, margin=margin, fall=fall, counts=counts) for counts in draws]
    return Measured(choice, trials, eigenvalues, guessing, chance_bound(labels), whole, drawn)


def _lora(one: Measured, measured: Sequence[Measured], chosen: Sequence[Choice]) -> Measured | None:
    lora = lora_of(one.choice, chosen)
    return next((other for other in measured if other.choice is lora), None)


def _which(choice: Choice) -> dict[str, Any]:
    return {"task": choice.request.task, "factor": choice.factor, "value": choice.value}


def _row(one: Measured, lora: Measured | None, step: float) -> dict[str, Any]:
    found, widths = one.found, np.array([each.width for each in one.drawn])
    row: dict[str, Any] = {
        **_which(one.choice),
        "best_pct": round(found.level, 2),
        "low_rate": _rate(found.low),
        "high_rate": _rate(found.high),
        "high_interval": [_rate(bound) for bound in bounds(np.array([each.high for each in one.drawn]))],
        "fall_rate": None if found.open_fall else _rate(found.fall),
        "times": {"mean": _times(found.width), **dict(zip(("low", "high"), map(_times, bounds(widths)), strict=True))},
        "ends_with_grid": [end for end, is_open in (("low", found.open_low), ("high", found.open_high)) if is_open],
        "interval_ends_with_grid": one.open_low or one.open_high,
        "rates_count": len(one.trials),
    }
    if lora is not None and lora is not one:
        differences = widths - [each.width for each in lora.drawn]
        mean, (low, high) = found.width - lora.found.width, bounds(differences)
        difference = Difference.stored(mean, low, high, len(one.trials[0]))
        row["over_lora"] = {"mean": _times(mean), "low": _times(low), "high": _times(high)}
        ends = (bool(row["ends_with_grid"]), lora.found.open_low or lora.found.open_high)
        row["ratio_is"] = {(True, False): "at least", (False, True): "at most", (True, True): "unbounded"}.get(ends)
        row["could_have_seen"] = _times(difference.detectable or 0.0)
        row["word"] = word_of(
            difference, step, own=one.open_low or one.open_high, other=lora.open_low or lora.open_high
        )
    return row


def word_of(difference: Difference, step: float, *, own: bool, other: bool) -> str:
    """Wider, narrower, equal within a step of the grid, or not resolved.

    Parameters
    ----------
    difference
        In doublings.
    step
        Of the grid, in doublings.
    own, other
        Whether the width is a lower bound, and LoRA's.
    """
    word = {"better": "wider", "worse": "narrower"}.get(found := difference.word(step), found)
    certain = {"wider": not other, "narrower": not own, "equal": not (own or other)}
    return word if certain.get(word, True) else "not resolved"


def _lines(one: Measured, rates: Sequence[float]) -> list[dict[str, Any]]:
    """A record a rate."""
    lines = []
    for rate, trials in zip(rates, one.trials, strict=False):
        accuracies = [one.guessing if trial.accuracy_pct is None else trial.accuracy_pct for trial in trials]
        lines.append(
            {
                **_which(one.choice),
                "learning_rate": rate,
                "mean_pct": round(float(np.mean(accuracies)), 2),
                "diverged_count": sum(trial.accuracy_pct is None for trial in trials),
                "at_chance_count": sum(value <= one.bound for value in accuracies),
                "accuracies_pct": [round(value, 2) for value in accuracies],
            }
        )
    return lines


def _explanations(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Every eigenvalue beside every rate that it may explain, the registered pair first."""
    tasks = list(dict.fromkeys(one.choice.request.task for one in measured))
    grid = [[one for one in measured if one.choice.request.task == task] for task in tasks]
    rng, draws, seeds = np.random.default_rng(1), len(measured[0].drawn), len(measured[0].eigenvalues)
    picked = rng.integers(seeds, size=(draws, seeds))  # the same for all choices
    records = []
    for kind in KINDS:
        values = np.array([[[seed[kind] for seed in one.eigenvalues] for one in row] for row in grid])
        for end in RATES:
            ends = np.array([[getattr(one.found, end) for one in row] for row in grid])
            drawn = np.array([[[getattr(each, end) for each in one.drawn] for one in row] for row in grid])
            found = explained(
                values.mean(2), ends, (values[..., picked].mean(3).transpose(2, 0, 1), drawn.transpose(2, 0, 1))
            )
            records.append({"eigenvalue": kind, "rate": end, "registered": (kind, end) == REGISTERED, **asdict(found)})
    return sorted(records, key=lambda record: not record["registered"])


def _rate(log: float) -> float:
    return float(f"{2**log:.3g}")


def _times(doublings: float) -> float:
    return float(f"{2**doublings:.3g}")
