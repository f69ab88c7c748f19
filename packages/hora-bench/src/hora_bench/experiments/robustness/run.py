"""Accuracy under corruptions and adversarial steps, of choices that differ in something, beside LoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Self

from hora_spec import HoraError

from hora_bench.choices import Sweep, choices, lora_of
from hora_bench.request import Inputs
from hora_bench.search import edge_of
from hora_bench.setting import Setting
from hora_bench.stats import LEAST_ABOVE, guessing
from hora_bench.store import Journal
from hora_bench.sweep import AT_OWN_RATES, DIVERGED, Contender, searched, searched_too, tasks_of, tried, which

from .attacks import RELATIVE_STEP, Attack
from .corruptions import corruptions_of
from .measures import ANSWERS, LEVEL_OF_ANSWERS, answer_of, groups_of, rows_of
from .scoring import ATTACKED, CLEAN, Seen, scored

IMAGES: Final = 400
OWN: Final = ("corruptions", "attack", "images")  # beside the fields of a sweep
IDLE: Final = ("race", "fractions", "learning_rates", "controls")
NOTES: Final = """\
What is judged was fixed before anything was measured: the share kept, (changed - chance) / (clean - chance) in \
percent, of the mean over all corruptions and of the mean over both attacks, over LoRA's with the same seeds. These \
two of each choice are judged; what stands under a single condition is described. Chance is one answer for all, the \
most frequent.
Scored are {scored} test images, as equally many of each class as there are, or all where there are fewer.
A difference of losses of accuracy, clean less changed, is shown beside it and judges nothing: who is more accurate on \
clean images has more to lose. Nothing is said of a choice that is less than {least:g} points above chance on them.
Intervals of what is registered are Student's t over the seeds at {level:g} %, so that both of a choice hold together \
with 95 %; those of single conditions are at 95 %. Of choices that do not differ from LoRA one in twenty is resolved \
by luck. The interval of other examples, at 95 %, resamples seeds and test examples alike.
The detectable difference is what so many seeds would have shown in four of five such experiments. Equal is within a \
margin of {margin:g} percent of what is kept, stated beforehand.
Corruptions are applied to test images at the size that the model sees, {size} px, as in ImageNet-C, and to none that \
is learned from: noise by its standard deviation of 255, drawn from the image's pixels, blur by its radius in pixels, \
contrast by the share kept, JPEG by its quality.
Attacks see the whole model of the seed that they attack, frozen blocks included, on {images} test images, as equally \
many of each class as there are: FGSM, and PGD of {steps} steps of {step:.3g} from a random start. Pixels stay valid \
and within {epsilon:g} of 255 of the image, not rounded to bytes. A stronger attack may leave less.\
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is compared on what: the table ``[vary]`` of a file.

    Attributes
    ----------
    sweep
        Choices, tasks, the search and the seeds.
    corruptions
        Kinds to strengths.
    attack
        Adversarial steps.
    images
        Of the test split that are scored, as equally many of each class as there are.
    """

    sweep: Sweep
    corruptions: Mapping[str, Sequence[float]]
    attack: Attack
    images: int

    @classmethod
    def of(cls, vary: Mapping[str, Any]) -> Self:
        """From the table of a file.

        Raises
        ------
        HoraError
            It holds something else, or something that would change nothing.
        """
        rest = {name: value for name, value in vary.items() if name not in OWN}
        corruptions = corruptions_of(vary.get("corruptions", {}))
        attack = Attack.of(vary.get("attack", {}))
        images, sweep = vary.get("images", IMAGES), Sweep.of(rest)
        if type(images) is not int or images < attack.images:
            raise HoraError(
                f"images that are scored are a number from that of those attacked, {attack.images}, got {images!r}: "
                "change one"
            )
        if sweep.search is None:
            raise HoraError("choices are compared at rates of their own, got no search: write search = [1e-3, 2e-3]")
        if idle := [name for name in IDLE if getattr(sweep, name)]:
            raise HoraError(f"robustness has no {', '.join(IDLE)}, got {', '.join(idle)}: drop it, or use sweep")
        return cls(sweep=sweep, corruptions=corruptions, attack=attack, images=images)


def robustness(
    setting: Setting,
    out: Path,
    plan: Plan,
    *,
    command: str = "",
    journal: Journal | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Search every choice's rate on clean validation, train it with every seed, and score it on changed test images.

    Parameters
    ----------
    setting
        Base request, of a screen, and data.
    out
        Folder of the search's result files; what is found there is not repeated.
    plan
        What is compared on what.
    command, journal, progress
        Recorded in the files of the search, finished choices, and a callback with pieces done and in total.

    Returns
    -------
    dict
        ``setting``; ``answers``, what is registered and judged; ``rows``, every condition of every choice; ``choices``
        at their rates; ``search``, every rate tried; ``notes``.

    Raises
    ------
    HoraError
        The request is of no screen, or a choice has no LoRA beside it.
    """
    base, asked, journal = setting.base, plan.sweep, journal or Journal(None)
    chosen = [*choices(base, asked)]
    if base.last_blocks is None:
        raise HoraError("robustness is measured on a screen, got all blocks: set last_blocks")
    if base.seed:
        raise HoraError(f"seeds of a comparison are in [vary], got seed {base.seed} in [request]: move it")
    if not all(lora_of(choice, chosen) for choice in chosen):
        raise HoraError('robustness is compared with LoRA, got none beside every choice: add references = ["lora"]')
    tasks = tasks_of(setting, chosen)
    for task in tasks:
        if plan.attack.images < task.num_classes:
            raise HoraError(
                f"an image of each class is attacked, got {plan.attack.images} of {task.num_classes} classes of "
                f"{task.name}: raise images of the attack"
            )
    contenders = searched(chosen, tasks, out, asked, command=command)
    steps = len(contenders) * 2
    progress(len(contenders), steps)
    on = plan.corruptions, plan.attack, plan.images
    seen_of = cache(lambda place: Seen.of(contenders[place].request, contenders[place].task, *on))
    pieces = []
    for place, one in enumerate(contenders):
        first = next(i for i, other in enumerate(contenders) if _view(other) == _view(one))
        own = [one.request.replace(seed=seed) for seed in asked.seeds]
        key = [own[0].model_dump(), [*asked.seeds], plan.corruptions, plan.attack.model_dump(), plan.images]
        key.append(Inputs.of(own[0], one.task).model_dump())
        pieces.append(journal.once(key, lambda own=own, one=one, first=first: _scored(own, one, seen_of(first), plan)))
        progress(len(contenders) + place + 1, steps)
    return {
        "setting": {
            **chosen[0].request.model_dump(),
            "seeds": list(asked.seeds),
            "margin_pct": asked.margin,
            "corruptions": {kind: list(strengths) for kind, strengths in plan.corruptions.items()},
            "attack": plan.attack.model_dump(),
            "images": plan.images,
        },
        **_compared(contenders, pieces, plan),
        "search": tried(contenders),
        "notes": _notes(setting, plan, pieces),
    }


def _view(one: Contender) -> tuple[Any, ...]:
    """What decides what a choice is scored on."""
    asked = one.request
    return (id(one.task), asked.model, asked.image_size_px, asked.last_blocks, asked.device)


def _scored(asked: Sequence[Any], one: Contender, seen: Seen, plan: Plan) -> dict[str, Any]:
    """What was scored, and what guessing has on all of it and on what is attacked."""
    labels = seen.splits[CLEAN].label[seen.splits[CLEAN].weight > 0].cpu().numpy()
    chance = [guessing(labels), guessing(seen.labels.cpu().numpy())]
    return {"chance_pct": chance, **scored(asked, one.task, seen, plan.attack)}


def _compared(contenders: Sequence[Contender], pieces: Sequence[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """Tables of choices, answers and conditions."""
    groups = [groups_of(piece, piece["chance_pct"]) for piece in pieces]
    found: dict[str, list[dict[str, Any]]] = {"choices": [], "answers": [], "rows": []}
    for one, piece, own in zip(contenders, pieces, groups, strict=True):
        place = next(i for i, other in enumerate(contenders) if other is one.lora)
        edges = [edge_of(other.trials, other.request.learning_rate) for other in (one, contenders[place])]
        found["choices"].append(
            {
                **which(one.choice),
                "learning_rate": one.request.learning_rate,
                "rate_at_edge": edges[0],
                "params_count": piece["params_count"],
                "diverged_count": sum(piece["diverged"]),
            }
        )
        for answer, clean in zip(ANSWERS, (CLEAN, ATTACKED), strict=True):
            lora = None if contenders[place] is one else groups[place][answer]
            said = answer_of(own[answer], lora, margin=plan.sweep.margin, bounded=not any(edges))
            found["answers"].append({**which(one.choice), "answer": answer, **said})
            found["rows"] += [{**which(one.choice), **row} for row in rows_of(own[answer], lora, clean, answer)]
    return found


def _notes(setting: Setting, plan: Plan, pieces: Sequence[dict[str, Any]]) -> list[str]:
    """How to read the numbers, and their limits."""
    proxy, attack = setting.base.proxy, plan.attack
    said = NOTES.format(
        least=LEAST_ABOVE,
        level=100 * LEVEL_OF_ANSWERS,
        margin=plan.sweep.margin,
        size=setting.base.image_size_px,
        scored=plan.images,
        images=attack.images,
        steps=attack.steps,
        step=RELATIVE_STEP * attack.epsilon / attack.steps,
        epsilon=attack.epsilon,
    )
    notes = [f"{proxy[0].upper()}{proxy[1:]}. It says nothing of a full run.", *said.splitlines()]
    notes += [*AT_OWN_RATES.splitlines(), *searched_too(plan.sweep)]
    return notes + ([DIVERGED] if any(any(piece["diverged"]) for piece in pieces) else [])
