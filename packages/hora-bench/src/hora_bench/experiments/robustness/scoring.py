"""A choice trained with every seed, and what it makes of clean, corrupted and attacked images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, final

import numpy as np
import torch
from hora_spec import HoraError
from jaxtyping import Float
from scipy.special import log_softmax
from torch.nn.functional import cross_entropy

from hora_bench.data.base import balanced
from hora_bench.models import load
from hora_bench.request import Request
from hora_bench.screen import Cached, Stack, Tokens, device_of, fitted, frozen, tokens

from .attacks import Attack, fgsm, pgd
from .corruptions import corrupt, named

CLEAN: Final = "clean"
ATTACKED: Final = "clean, images attacked"
ATTACKS: Final = ("fgsm", "pgd")
SIDE_BY_SIDE: Final = 400  # images of all seeds at a time
AGREE: Final = 1e-3  # of the largest logit

Outputs = dict[str, tuple[np.ndarray, np.ndarray]]  # of a condition: logits (seeds, examples, classes), and labels


@dataclass(frozen=True, slots=True)
class Seen:
    """What all choices of a task are scored on.

    Attributes
    ----------
    splits
        Clean and corrupted test images, as the last blocks see them.
    rows
        Numbers of those that are attacked.
    pixels, labels
        Those images ``(images, 3, height, width)`` from 0 to 1, and their classes.
    """

    splits: Mapping[str, Tokens]
    rows: np.ndarray
    pixels: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(
        cls, request: Request, task: Any, corruptions: Mapping[str, Sequence[float]], attack: Attack, images: int
    ) -> Seen:
        """The test split of a task as a request sees it.

        Parameters
        ----------
        request, task
            Model, size and blocks, and the images.
        corruptions
            Kinds to strengths.
        attack, images
            How many images are attacked, and how many are scored.
        """
        task = replace(task, test=task.test.take(balanced(task.labels("test"), images)))
        splits = {CLEAN: tokens(Cached.of(request, task, "test"))}
        for kind, strengths in corruptions.items():
            for strength in strengths:
                changed = task.changed(named(kind, strength), partial(corrupt, kind=kind, strength=strength))
                splits[named(kind, strength)] = tokens(Cached.of(request, changed, "test"))
        readable = np.flatnonzero(splits[CLEAN].weight.cpu().numpy())
        rows = readable[balanced(task.labels("test")[readable], attack.images)]
        batch, device = task.train_batch("test", rows, np.random.default_rng(0)), device_of(request)
        mean, std = (np.array(values, np.float32) for values in (task.view.mean, task.view.std))
        pixels = torch.from_numpy(batch["image"] * std + mean).clamp(0, 1).permute(0, 3, 1, 2)
        return cls(splits, rows, pixels.to(device), torch.from_numpy(batch["label"]).long().to(device))


@final
class Whole:
    """Seeds side by side as functions of pixels: the frozen blocks, and then the last ones of each seed.

    Parameters
    ----------
    stack
        The last blocks.
    request, view
        What they were trained for, and how the checkpoint normalises.
    """

    def __init__(self, stack: Stack, request: Request, view: Any) -> None:
        device, self._stack, self._blocks = device_of(request), stack, request.last_blocks or 0
        self._frozen = load.timm_vit(request.model, request.image_size_px or 0).requires_grad_(False).to(device)
        self._mean, self._std = (torch.tensor(values, device=device)[:, None, None] for values in (view.mean, view.std))

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """``(seeds, images, classes)`` of ``(seeds, images, 3, height, width)`` from 0 to 1."""
        hidden = frozen(self._frozen, self._blocks, ((pixels - self._mean) / self._std).flatten(0, 1))
        return self._stack.logits(hidden.unflatten(0, pixels.shape[:2]))


def scored(asked: Sequence[Request], task: Any, seen: Seen, attack: Attack) -> dict[str, Any]:
    """Train a choice with every seed, and score it on everything; JSON values.

    Parameters
    ----------
    asked
        Requests that differ in their seed alone, at the rate of the choice.
    task, seen, attack
        What is learned from, what is scored, and how it is attacked.

    Returns
    -------
    dict
        ``params_count``; ``diverged``, whether each seed did; ``conditions``, of each its ``count`` of examples, which
        were ``right``, in bits a seed, and the mean ``loss`` a seed.

    Raises
    ------
    HoraError
        The whole model does not compute what the screen computes.
    """
    stack, _, curve, _ = fitted(asked, task)
    outputs: Outputs = {}
    for name, split in seen.splits.items():
        readable = split.weight.cpu().numpy() > 0
        outputs[name] = stack.score(split.hidden)[:, readable], split.label.cpu().numpy()[readable]
    whole = Whole(stack, asked[0], task.view)
    attacked = attacks_of(whole, seen, attack, len(asked))
    diverged = ~np.isfinite(curve).all(0) | ~np.isfinite(outputs[CLEAN][0]).all((1, 2))
    _check_alike(attacked[ATTACKED][~diverged], stack.score(seen.splits[CLEAN].hidden[seen.rows])[~diverged])
    outputs |= {name: (found, seen.labels.cpu().numpy()) for name, found in attacked.items()}
    return {
        "params_count": stack.params_count,
        "diverged": diverged.tolist(),
        "conditions": {name: _condition(*of) for name, of in outputs.items()},
    }


def attacks_of(whole: Whole, seen: Seen, attack: Attack, seeds: int) -> dict[str, Float[np.ndarray, "seeds images c"]]:
    """Logits of every seed on the images as they are, and as the attacks on that seed leave them."""
    parts: dict[str, list[torch.Tensor]] = {ATTACKED: [], **{name: [] for name in ATTACKS}}
    start, radius = attack.start(tuple(seen.pixels.shape)).to(seen.pixels.device), attack.epsilon / 255
    size = max(1, SIDE_BY_SIDE // seeds)
    for pixels, labels, begin in zip(*(one.split(size) for one in (seen.pixels, seen.labels, start)), strict=True):
        images, answers = pixels.expand(seeds, *pixels.shape), labels.repeat(seeds)

        def loss_of(moved: torch.Tensor, answers: torch.Tensor = answers) -> torch.Tensor:
            return cross_entropy(whole.logits(moved).flatten(0, 1), answers, reduction="sum")

        found = fgsm(loss_of, images, radius), pgd(loss_of, images, radius, steps=attack.steps, start=begin)
        with torch.no_grad():
            for name, moved in zip(parts, (images, *found), strict=True):
                parts[name].append(whole.logits(moved))
    return {name: torch.cat(part, dim=1).cpu().numpy() for name, part in parts.items()}


def _check_alike(whole: np.ndarray, screened: np.ndarray) -> None:
    """Refuse to attack another function than the one that is scored."""
    off = np.abs(whole - screened).max(initial=0)
    if off > AGREE * max(1, np.abs(screened).max(initial=0)):
        raise HoraError(f"the whole model computes what its screen does, got logits that differ by {off:g}: report it")


def _condition(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    right = np.packbits(logits.argmax(-1) == labels, axis=1)
    likelihood = np.take_along_axis(log_softmax(logits.astype(np.float64), axis=-1), labels[None, :, None], axis=-1)
    return {
        "count": len(labels),
        "right": [one.tobytes().hex() for one in right],
        "loss": (-likelihood.mean((1, 2))).tolist(),
    }


def right_of(condition: Mapping[str, Any]) -> Float[np.ndarray, "seeds examples"]:
    """1 where a seed was right, else 0."""
    packed = np.array([np.frombuffer(bytes.fromhex(one), np.uint8) for one in condition["right"]])
    return np.unpackbits(packed, axis=1, count=condition["count"]).astype(float)
