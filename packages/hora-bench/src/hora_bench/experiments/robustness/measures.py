"""What is kept under corruptions and attacks beside LoRA, from which examples each seed had right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from jaxtyping import Float

from hora_bench.stats import LEVEL, Difference, kept, level_of_looks, mean_interval, resampled

from .scoring import ATTACKED, ATTACKS, CLEAN, right_of

ANSWERS: Final = ("corruptions", "attacks")  # each the mean over its conditions, and all that is judged
LEVEL_OF_ANSWERS: Final = level_of_looks(len(ANSWERS))
MEAN: Final = "mean of"
Right = Float[np.ndarray, "seeds examples"]


@dataclass(frozen=True, slots=True)
class Group:
    """Conditions of one answer: a choice on clean images and on changed ones, those of a seed in the same order.

    Attributes
    ----------
    clean, changed
        Which examples were right, in the second by condition; a seed that diverged has the share of guessing.
    loss
        Mean loss by condition, over the seeds that did not diverge.
    chance_pct
        Accuracy of guessing.
    """

    clean: Right
    changed: Mapping[str, Right]
    loss: Mapping[str, float | None]
    chance_pct: float

    def under(self, condition: str) -> Right:
        """Of a condition; the mean of all where its name says so, and clean where there is none of the name."""
        if condition.startswith(MEAN):
            return np.mean([*self.changed.values()], axis=0)
        return self.changed.get(condition, self.clean)

    def kept(self, condition: str) -> Right | None:
        """Percent of accuracy above chance that is left, by seed and example; None where there was hardly any."""
        return kept(100 * self.under(condition), 100 * self.clean, self.chance_pct)


def groups_of(piece: Mapping[str, Any], chance_pct: Sequence[float]) -> dict[str, Group]:
    """Of each answer, from what was scored.

    Parameters
    ----------
    piece
        Of `scoring.scored`.
    chance_pct
        Of the test split, and of the images that are attacked.
    """
    found, diverged = piece["conditions"], np.array(piece["diverged"])
    members = {
        "corruptions": (CLEAN, [name for name in found if name not in (CLEAN, ATTACKED, *ATTACKS)]),
        "attacks": (ATTACKED, [*ATTACKS]),
    }
    groups = {}
    for (answer, (clean, names)), chance in zip(members.items(), chance_pct, strict=True):
        right = {name: right_of(found[name]) for name in (clean, *names)}
        for one in right.values():
            one[diverged] = chance / 100
        means = {name: np.array(found[name]["loss"])[~diverged] for name in (clean, *names)}
        loss = {name: round(float(of.mean()), 4) if len(of) else None for name, of in means.items()}
        groups[answer] = Group(right[clean], {name: right[name] for name in names}, loss, chance)
    return groups


def rows_of(group: Group, lora: Group | None, clean: str, answer: str) -> list[dict[str, Any]]:
    """Every condition of a choice: described, not judged.

    Parameters
    ----------
    group, lora
        Of the choice, and of LoRA beside it; None for LoRA.
    clean, answer
        What images that are not changed, and all conditions together, are called.
    """
    rows = []
    for name in (clean, *group.changed, f"{MEAN} {answer}"):
        right, before = group.under(name), _pct(group.clean)
        accuracies = _pct(right)
        row: dict[str, Any] = {"condition": name, **mean_interval(accuracies.tolist(), right.shape[1])}
        row |= {"test_loss": group.loss.get(name), "accuracies_pct": accuracies.round(2).tolist()}
        if name != clean:
            row["lost_pct"] = round(float((before - accuracies).mean()), 2)
            row["kept_pct"] = _mean(group.kept(name))
        if lora is not None:
            other, start = _pct(lora.under(name)), _pct(lora.clean)
            row["over_lora_pct"] = _over(accuracies, other)
            if name != clean:
                row["lost_over_lora_pct"] = _over(before - accuracies, start - other)
                level = LEVEL_OF_ANSWERS if name.startswith(MEAN) else LEVEL
                row["kept_over_lora_pct"] = _over(group.kept(name), lora.kept(name), level)
        rows.append(row)
    return rows


def answer_of(group: Group, lora: Group | None, *, margin: float, bounded: bool) -> dict[str, Any]:
    """What is registered: the share kept in the mean of all conditions, over LoRA's.

    Parameters
    ----------
    group, lora
        As for `rows_of`.
    margin
        Percent within which shares are equal.
    bounded
        Neither has its rate at the edge of its grid; else nothing is said.
    """
    share = group.kept(MEAN)
    found: dict[str, Any] = {"chance_pct": round(group.chance_pct, 2), "clean_pct": _mean(100 * group.clean)}
    found |= {"changed_pct": _mean(100 * group.under(MEAN)), "kept_pct": _mean(share)}
    if lora is None:
        return found
    theirs, word = lora.kept(MEAN), "not resolved"
    found["kept_over_lora_pct"] = _over(share, theirs, LEVEL_OF_ANSWERS)
    if share is not None and theirs is not None and len(share) > 1:
        low, high = np.percentile(resampled(share - theirs), [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
        found["of_other_examples_pct"] = [round(float(low), 2), round(float(high), 2)]
        word = _difference(share, theirs, LEVEL_OF_ANSWERS).word(margin) if bounded else word
    return {**found, "word": word}


def _pct(right: Right) -> Float[np.ndarray, " seeds"]:
    return 100 * right.mean(1)


def _mean(values: np.ndarray | None) -> float | None:
    return None if values is None else round(float(values.mean()), 2)


def _difference(own: np.ndarray, theirs: np.ndarray, level: float) -> Difference:
    """Over the seeds, of values of seeds or of their examples."""
    return Difference.of(*(one.reshape(len(one), -1).mean(1).tolist() for one in (own, theirs)), level=level)


def _over(own: np.ndarray | None, theirs: np.ndarray | None, level: float = LEVEL) -> dict[str, Any] | None:
    """A difference as results have it; None where a choice is hardly above chance on clean images."""
    if own is None or theirs is None:
        return None
    one = _difference(own, theirs, level)
    return {
        "mean_pct": one.mean,
        "low_pct": one.low,
        "high_pct": one.high,
        "detectable_pct": one.detectable,
        "seeds_count": one.seeds,
        "level": one.level,
    }
