"""The one engine of comparisons: choices that differ in something, alike in all else, with paired differences.

A file says what differs. Ablations, curves over fractions of the data, tuned comparisons and controls are such files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from hora_spec import HoraError

from hora_bench import store
from hora_bench.choices import Choice, Sweep, choices, lora_of
from hora_bench.control import CONTROL, control, controlled
from hora_bench.request import FINAL, Request
from hora_bench.run import results
from hora_bench.search import edge_of, search, trials_of
from hora_bench.setting import Setting
from hora_bench.stats import Difference, guessing, level_of_looks, mean_interval, two_way_interval
from hora_bench.store import RunResult, Trial

AT_ONE_RATE: Final = """\
Validation accuracy; the test split is not looked at. Everything else as in the first row, learning rate included: a \
choice that wants another rate looks worse here.\
"""
AT_OWN_RATES: Final = """\
Every choice takes its learning rate from one search on validation; it is judged once per seed on the test split, \
after training on training and validation examples. Labels of validation that a search looked at count as used.
Choices that are compared try equally many rates. A best rate at the grid's edge is marked: a better one may lie \
beyond, and the comparison decides nothing.\
"""
PAIRED: Final = """\
Differences are paired: equal seeds mean equal subset and order of the data. Their {level:g} % intervals are Student's \
t over the seeds, absent for one seed; an interval that holds 0 is no finding, and one in twenty that does not is luck.
The interval of other examples, at 95 %, holds that the test examples are a sample too: seeds and examples resampled.
The difference from LoRA is from LoRA under otherwise equal circumstances: as many steps, as much data.
The detectable difference is what so many seeds would have shown in four of five such experiments. Equal is within \
a margin of {margin:g}, stated beforehand.\
"""
RACED: Final = """\
A race: {race} seeds at a time, and a choice stops once its difference from LoRA is settled (better, worse or equal). \
Intervals have a level at which all looks together are wrong once in twenty. A difference that stopped early is, in \
the mean, larger than the truth: confirm it with fresh seeds.\
"""
SEARCHED_TOO: Final = "Of the seeds that judge, these searched, too, on validation: {seeds}."
DIVERGED: Final = "A run that diverged counts as guessing."


@dataclass(slots=True)
class Contender:
    """A choice at its rate, what it is compared with, and its results so far."""

    choice: Choice
    task: Any
    request: Request
    trials: list[Trial]
    lora: Contender | None = None
    found: list[RunResult | None] = field(default_factory=list)

    @property
    def accuracies_pct(self) -> list[float]:
        """One a seed; guessing where a run diverged."""
        return [
            one.scores.accuracy_pct if one else guessing(self.task.labels(self.request.score_on)) for one in self.found
        ]

    def loss_over(self, other: Contender, level: float) -> dict[str, float | None] | None:
        """Test loss less that of another over the seeds that both have, with its interval; None where one diverged."""
        pairs = list(zip(self.found, other.found, strict=False))
        losses = [[one.scores.loss if one else None for one in pair] for pair in pairs]
        if not losses or any(loss is None for pair in losses for loss in pair):
            return None
        found = Difference.of(*zip(*losses, strict=True), level=level, digits=4)
        return {"mean": found.mean, "low": found.low, "high": found.high}

    def over(self, other: Contender, level: float) -> Difference:
        """Over the seeds that both have."""
        seeds = min(len(self.found), len(other.found))
        return Difference.of(self.accuracies_pct[:seeds], other.accuracies_pct[:seeds], level=level)


def sweep(
    setting: Setting,
    out: Path,
    asked: Sweep,
    *,
    command: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Run every choice with every seed, or with as many as settle it, and compare.

    Parameters
    ----------
    setting
        Base request and data.
    out
        Folder of the runs' result files; runs found there are not repeated.
    asked
        What is compared.
    command, progress
        Recorded in the runs' files, and a callback with pieces done and in total.

    Returns
    -------
    dict
        ``setting``; ``rows``, per choice its accuracy with interval, paired differences from the first and from LoRA,
        and the word for the latter; ``search``, every rate tried; ``controls``; ``notes``.

    Raises
    ------
    HoraError
        A race has no LoRA to be run against.
    """
    chosen = [*choices(setting.base, asked)]
    controlled(setting.base, asked.controls)  # before anything runs
    looks, level = len(asked.batches), level_of_looks(len(asked.batches))
    if setting.base.seed:
        raise HoraError(f"seeds of a comparison are in [vary], got seed {setting.base.seed} in [request]: move it")
    if asked.race and not any(lora_of(choice, chosen) for choice in chosen):
        raise HoraError('a race is against LoRA, got none under equal circumstances: add references = ["lora"]')
    contenders = searched(chosen, tasks_of(setting, chosen), out, asked, command=command)
    count = len(contenders)
    progress(count, count * (1 + looks))
    for look, seeds in enumerate(asked.batches, 1):
        wanted = [_wanted(one, contenders, asked.margin, level) for one in contenders]
        for place, one in enumerate(contenders, 1):
            if wanted[place - 1]:
                one.found += results(one.request, seeds, one.task, out, command=command, trials=one.trials)
            progress(count * look + place, count * (1 + looks))
    rows = [_row(one, contenders, asked, level, out) for one in contenders]
    checked = control(setting, out, asked.controls, seed=asked.seeds[0], command=command)
    return {
        "setting": {
            **chosen[0].request.model_dump(),
            "seeds": list(asked.seeds),
            "margin_pct": asked.margin,
            "race": asked.race,
        },
        "rows": rows,
        "search": tried(contenders),
        "controls": checked,
        "notes": _notes(setting.base, asked, contenders, bool(checked)),
    }


def tasks_of(setting: Setting, chosen: Sequence[Choice]) -> list[Any]:
    """The data of each choice, read once for all that want it alike."""
    read: dict[tuple[Any, ...], Any] = {}
    for choice in chosen:
        key = _data_of(choice.request)
        read[key] = read[key] if key in read else setting.load(choice.request.task, choice.request)
    return [read[_data_of(choice.request)] for choice in chosen]


def _data_of(asked: Request) -> tuple[Any, ...]:
    return (asked.task, asked.model, asked.image_size_px, asked.scoring, asked.limit)


def searched(
    chosen: Sequence[Choice], tasks: Sequence[Any], out: Path, asked: Sweep, *, command: str = ""
) -> list[Contender]:
    """Every choice at its own rate, after as many trials as others on its task and fraction, or at the base's.

    Parameters
    ----------
    chosen, tasks
        What is compared, and the data of each.
    out, asked, command
        As for `sweep`.
    """
    found = [Contender(choice, task, choice.request, []) for choice, task in zip(chosen, tasks, strict=True)]
    groups: dict[Any, list[Contender]] = {}
    for one in found:
        groups.setdefault((one.request.task, one.request.fraction), []).append(one)
    for group in groups.values():
        if asked.search is None:
            break
        by_request = {one.request.model_dump_json(): one.task for one in group}

        def trials_at(request: Request, rate: float, tasks: Mapping[str, Any] = by_request) -> list[Trial]:
            task, at_rate = tasks[request.model_dump_json()], request.replace(learning_rate=rate)
            return trials_of(at_rate, asked.searching, task, out, command=command)

        best = search([one.request for one in group], trials_at, asked.search)
        for one, (request, trials) in zip(group, best, strict=True):
            one.request, one.trials = request.replace(**FINAL), trials
    for one in found:
        lora = lora_of(one.choice, chosen)
        one.lora = next((other for other in found if other.choice is lora), None)
    return found


def _wanted(one: Contender, contenders: Sequence[Contender], margin: float, level: float) -> bool:
    """Whether more seeds may tell more: a LoRA runs as long as any choice that is compared with it."""
    if one.lora is not one:
        return not _settled(one, margin, level)
    rivals = [other for other in contenders if other.lora is one and other is not one]
    return not rivals or any(not _settled(rival, margin, level) for rival in rivals)


def _settled(one: Contender, margin: float, level: float) -> bool:
    return bool(one.found and one.lora) and one.over(one.lora, level).word(margin) != "not resolved"


def tried(contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """Every trial of every choice, as results have them."""
    return [{**which(one.choice), **trial.model_dump(exclude={"file"})} for one in contenders for trial in one.trials]


def which(choice: Choice) -> dict[str, Any]:
    """The fields by which results tell choices apart."""
    asked = choice.request
    return {"task": asked.task, "factor": choice.factor, "value": choice.value, "fraction": asked.fraction}


def _row(one: Contender, contenders: Sequence[Contender], asked: Sweep, level: float, out: Path) -> dict[str, Any]:
    done = [result for result in one.found if result]
    examples = done[0].scores.total_count if done else len(one.task.labels(one.request.score_on))
    first = next(other for other in contenders if _place(other) == _place(one))
    losses = [result.scores.loss for result in done if result.scores.loss is not None]
    row: dict[str, Any] = {
        **which(one.choice),
        "method": one.request.method,
        "steps": one.request.steps,
        "learning_rate": one.request.learning_rate,
        "rate_at_edge": edge_of(one.trials, one.request.learning_rate),
        **mean_interval(one.accuracies_pct, examples),
        "test_loss": round(float(np.mean(losses)), 4) if losses else None,
        "loss": round(float(np.mean([result.loss[-10:] for result in done])), 5) if done else None,
        "diverged_count": len(one.found) - len(done),
        "params_count": done[0].trained_params_count if done else None,
        "labels_count": max((result.labels_count or 0 for result in done), default=None),
        "accuracies_pct": one.accuracies_pct,
    }
    for name, other in (("default", first), ("lora", one.lora)):
        if other is not None:
            difference = one.over(other, level)
            found = asdict(difference)
            row[f"over_{name}_pct"] = {f"{key}_pct": found[key] for key in ("mean", "low", "high", "detectable")}
            row[f"over_{name}_pct"] |= {"seeds_count": difference.seeds, "level": level}
            row[f"over_{name}_pct"] |= _of_other_examples(one, other, difference.seeds, out)
    if one.lora is not None and one.lora is not one:
        row["loss_over_lora"] = one.loss_over(one.lora, level)
    if asked.search and one.lora is not None and one.lora is not one:
        bounded = not any(edge_of(other.trials, other.request.learning_rate) for other in (one, one.lora))
        row["word"] = one.over(one.lora, level).word(asked.margin) if bounded else "not resolved"
    return row


def _of_other_examples(one: Contender, other: Contender, seeds: int, out: Path) -> dict[str, Any]:
    """The difference's interval over seeds and examples alike; none for one seed, or where one of them diverged."""
    pairs = list(zip(one.found[:seeds], other.found[:seeds], strict=True))
    if one is other or seeds < 2 or any(None in pair for pair in pairs):
        return {}
    right, theirs = (np.array([store.right(out, result) for result in side]) for side in zip(*pairs, strict=True))
    _, low, high = two_way_interval(right, theirs)
    return {"of_other_examples_pct": [round(low, 2), round(high, 2)]}


def _place(one: Contender) -> tuple[str, float]:
    return (one.request.task, one.request.fraction)


def _notes(base: Request, asked: Sweep, contenders: Sequence[Contender], controlled: bool) -> list[str]:
    """How to read the numbers, and their limits."""
    level = 100 * level_of_looks(len(asked.batches))
    notes = [f"{base.proxy[0].upper()}{base.proxy[1:]}. It says nothing of a full run."] if base.proxy else []
    notes += (AT_OWN_RATES if asked.search else AT_ONE_RATE).splitlines()
    notes += PAIRED.format(level=level, margin=asked.margin).splitlines()
    notes += searched_too(asked)
    notes += [RACED.format(race=asked.race)] if asked.race else []
    notes += [DIVERGED] if any(None in one.found for one in contenders) else []
    return [*notes, *([CONTROL] if controlled else [])]


def searched_too(asked: Sweep) -> list[str]:
    """That seeds both search and judge, where some do."""
    twice = [seed for seed in asked.searching if asked.search and seed in asked.seeds]
    return [SEARCHED_TOO.format(seeds=", ".join(map(str, twice)))] if twice else []
