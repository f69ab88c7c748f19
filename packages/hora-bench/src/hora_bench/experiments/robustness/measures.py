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

    @property
    def mean(self) -> Right:
        """Of all conditions."""
        return np.mean([*self.changed.values()], axis=0)


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
    conditions = {clean: group.clean, **group.changed, f"mean of {answer}": group.mean}
    theirs = {} if lora is None else {clean: lora.clean, **lora.changed, f"mean of {answer}": lora.mean}
    rows = []
    for name, right in conditions.items():
        accuracies, before = _pct(right), _pct(group.clean)
        row: dict[str, Any] = {"condition": name, **mean_interval(accuracies, right.shape[1])}
        row |= {"test_loss": group.loss.get(name), "accuracies_pct": np.round(accuracies, 2).tolist()}
        share = kept(accuracies, before, group.chance_pct)
        if name != clean:
            row |= {"lost_pct": round(float(np.mean(before) - np.mean(accuracies)), 2), "kept_pct": _rounded(share)}
        if lora is not None:
            other, start = _pct(theirs[name]), _pct(lora.clean)
            row |= {"over_lora_pct": _written(Difference.of(accuracies, other))}
            if name != clean:
                lost = [[c - a for c, a in zip(*pair, strict=True)] for pair in ((before, accuracies), (start, other))]
                row |= {"lost_over_lora_pct": _written(Difference.of(*lost))}
                row |= {"kept_over_lora_pct": _written(kept_over(share, kept(other, start, lora.chance_pct), LEVEL))}
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
    share = kept(_pct(group.mean), _pct(group.clean), group.chance_pct)
    found: dict[str, Any] = {"chance_pct": round(group.chance_pct, 2), "clean_pct": _mean(group.clean)}
    found |= {"changed_pct": _mean(group.mean), "kept_pct": _rounded(share)}
    if lora is None:
        return found
    over = kept_over(share, kept(_pct(lora.mean), _pct(lora.clean), lora.chance_pct), LEVEL_OF_ANSWERS)
    found["kept_over_lora_pct"] = _written(over)
    if over is not None and over.low is not None:
        draws = [_resampled(one) for one in (group, lora)]
        low, high = np.percentile(draws[0] - draws[1], [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
        found["of_other_examples_pct"] = [round(float(low), 2), round(float(high), 2)]
    return {**found, "word": over.word(margin) if over is not None and bounded else "not resolved"}


def kept_over(own: list[float] | None, theirs: list[float] | None, level: float) -> Difference | None:
    """Of shares kept; None where a choice is hardly above chance on clean images."""
    return None if own is None or theirs is None else Difference.of(own, theirs, level=level)


def _resampled(group: Group) -> np.ndarray:
    """Shares kept by resamples of seeds and examples."""
    changed, clean = (100 * resampled(one) - group.chance_pct for one in (group.mean, group.clean))
    return 100 * changed / clean


def _pct(right: Right) -> list[float]:
    """Accuracy of each seed."""
    return (100 * right.mean(1)).tolist()


def _rounded(share: list[float] | None) -> float | None:
    return None if share is None else round(float(np.mean(share)), 2)


def _mean(right: Right) -> float:
    return round(100 * float(right.mean()), 2)


def _written(one: Difference | None) -> dict[str, Any] | None:
    if one is None:
        return None
    return {
        "mean_pct": one.mean,
        "low_pct": one.low,
        "high_pct": one.high,
        "detectable_pct": one.detectable,
        "seeds_count": one.seeds,
        "level": one.level,
    }
