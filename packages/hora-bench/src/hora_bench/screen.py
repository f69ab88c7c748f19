"""A screen: the last blocks of a vision transformer, trained on cached outputs of the frozen ones, seeds side by side.

It is a proxy. It asks cheaply (`benchmarks/screen.py`) whether a full run is worth it; what it finds is said of it, not
of training all blocks, and no claim is judged by it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self, final

import numpy as np
import psutil
import torch
from hora_spec import HoraError
from torch import nn

from hora_bench import methods, store
from hora_bench.backends import check_device
from hora_bench.backends.torch_methods import prepare
from hora_bench.cache import new_directory, one_at_a_time
from hora_bench.data.base import Split, Task
from hora_bench.models import load
from hora_bench.recipe import batch_indices, head_init, subset
from hora_bench.request import Inputs, Request, name_of
from hora_bench.run import EVAL_BATCH, Progress, finished, result_of, silent
from hora_bench.store import PREDICTIONS, RunResult, Trial
from hora_bench.versions import machine


@dataclass(frozen=True, slots=True)
class Cached:
    """Where the tokens of a split come from; `task` holds the images whose digest is `data`."""

    data: str
    model: str
    size: int
    blocks: int
    split: Split
    device: torch.device
    task: Any = field(compare=False, repr=False)

    @classmethod
    def of(cls, request: Request, task: Any, split: Split) -> Self:
        """Of a split of a task, as a request sees it; the digest is the task's own."""
        size, blocks = request.image_size_px or 0, request.last_blocks or 0
        return cls(task.fingerprint(), request.model, size, blocks, split, device_of(request), task)


def screen(
    asked: Sequence[Request],
    task: Task,
    out: Path,
    *,
    command: str,
    trials: Sequence[Trial] = (),
    progress: Progress = silent,
) -> list[RunResult | None]:
    """Train requests that differ in their seed alone, all at once.

    Parameters
    ----------
    asked
        Requests with `last_blocks`; results that are in `out` are read.
    task, out, command, trials, progress
        As for `hora_bench.run.run`.

    Returns
    -------
    list of RunResult or None
        One a request; None where the loss of a seed was not finite, which touches no other seed.

    Raises
    ------
    HoraError
        The task changes its images while training, or the model has too few blocks.

    Notes
    -----
    Initial values, subsets, order of the data and AdamW's steps are those of a run of the whole model in which the
    earlier blocks are not adapted; which seeds stand beside each other changes rounding alone.
    """
    inputs = Inputs.of(asked[0], task)
    names = [name_of(one, inputs) for one in asked]
    found = {name: finished(one, inputs, task, out, trials) for one, name in zip(asked, names, strict=True)}
    if None in found.values():
        store.check_writable(out)
        with ExitStack() as others:  # processes that want some of these wait; in one order, so that none wait for ever
            for name in sorted(name for name, result in found.items() if result is None):
                others.enter_context(one_at_a_time(out / name))
            found |= {name: finished(one, inputs, task, out, trials) for one, name in zip(asked, names, strict=True)}
            missing = [one for one, name in zip(asked, names, strict=True) if found[name] is None]
            if not missing:
                return [found[name] for name in names]
            fresh = _screened(missing, task, out, inputs, command=command, trials=trials, progress=progress)
            found |= {name_of(one, inputs): result for one, result in zip(missing, fresh, strict=True)}
    return [found[name] for name in names]


def _screened(
    asked: Sequence[Request],
    task: Any,
    out: Path,
    inputs: Inputs,
    *,
    command: str,
    trials: Sequence[Trial],
    progress: Progress,
) -> Iterator[RunResult | None]:
    stack, members, curve, seconds = fitted(asked, task, progress)
    scored_on = tokens(Cached.of(asked[0], task, asked[0].score_on))
    start = time.perf_counter()
    logits = stack.score(scored_on.hidden)
    scored = (time.perf_counter() - start) / len(asked)
    for one, own, loss, outputs in zip(asked, members, curve.T, logits, strict=True):
        if not (np.isfinite(loss).all() and np.isfinite(outputs).all()):
            yield None
            continue
        judged = task.judge(one.score_on, outputs)
        with new_directory(out / name_of(one, inputs)) as folder:
            store.write_lines(folder / PREDICTIONS, map(asdict, judged))
        result = result_of(
            one,
            inputs,
            task,
            command=command,
            trials=trials,
            members=own,
            judged=judged,
            loss=loss.tolist(),
            counts=(stack.params_count, stack.total_params_count),
            files={PREDICTIONS: "one example a line: answer, prediction and loss"},
            measured=store.Measured(
                train_time_s=sum(seconds),
                step_time_s=float(np.median(seconds[1:] or seconds)),
                eval_time_s=scored,
                peak_memory_bytes=psutil.Process().memory_info().rss,
                step_seconds=seconds,
                machine={**machine(), "seeds_side_by_side_count": len(asked)},
            ),
        )
        result.write(out)
        yield result


class Fitted(NamedTuple):
    """Seeds side by side after training: numbers of their examples, losses ``(steps, seeds)``, seconds of each step."""

    stack: Stack
    members: list[np.ndarray]
    curve: np.ndarray
    seconds: list[float]


def fitted(asked: Sequence[Request], task: Any, progress: Progress = silent) -> Fitted:
    """Train requests that differ in their seed alone, and leave no file.

    Parameters
    ----------
    asked, task, progress
        As for `screen`.

    Raises
    ------
    HoraError
        As of `screen`.
    """
    first = asked[0]
    if task.augmentation != "none":
        raise HoraError(f"a screen caches what it sees, got {task.name}, whose images change: drop last_blocks")
    check_device("torch", first.device)
    learned = tokens(Cached.of(first, task, first.train_on))
    members = [subset(task.labels(first.train_on), one.fraction, one.seed) for one in asked]
    models = [model_of(one, task, learned, own) for one, own in zip(asked, members, strict=True)]
    stack = Stack(models, device_of(first))
    return Fitted(stack, members, *train(stack, asked, members, learned, progress))


def device_of(request: Request) -> torch.device:
    """Where a screen is trained."""
    return torch.device("cuda" if request.device != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the frozen blocks make of a split: ``hidden (examples, seq, embed)``, and its labels and weights."""

    hidden: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor

    def batch(self, members: np.ndarray, asked: Request, step: int) -> dict[str, torch.Tensor]:
        """The examples of one step of a seed."""
        rows = torch.from_numpy(members[batch_indices(len(members), asked.batch_size, step, asked.seed)])
        rows = rows.to(self.hidden.device)
        return {"image": self.hidden[rows], "label": self.label[rows], "weight": self.weight[rows]}


@lru_cache(maxsize=8)
@torch.no_grad()
def tokens(cached: Cached) -> Tokens:
    """Inputs of the last blocks for every example, computed once a process."""
    model = load.timm_vit(cached.model, cached.size).to(cached.device)
    parts: dict[str, list[Any]] = {"image": [], "label": [], "weight": []}
    for batch in cached.task.eval_batches(cached.split, EVAL_BATCH["images"]):
        image = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).to(cached.device)
        parts["image"].append(frozen(model, cached.blocks, image))
        for name in ("label", "weight"):
            parts[name].append(torch.from_numpy(batch[name]).to(cached.device))
    hidden, label, weight = (torch.cat(part)[: cached.task.size(cached.split)] for part in parts.values())
    return Tokens(hidden, label.long(), weight)


def frozen(model: Any, blocks: int, image: torch.Tensor) -> torch.Tensor:
    """What all but the last blocks make of images ``(batch, 3, height, width)``: ``(batch, seq, embed)``."""
    embedded = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image))))
    return model.blocks[:-blocks](embedded)


def model_of(request: Request, task: Any, seen: Tokens, members: np.ndarray) -> nn.Module:
    """The last blocks of a request's model, adapted; modules keep the names that they have in the whole model.

    Parameters
    ----------
    request, task
        What is adapted for which classes.
    seen, members
        The split that is learned from, and numbers of its examples: a method may start from the first batches.
    """
    model = deepcopy(_base(request.model, request.image_size_px or 0))
    head = head_init(model.num_features, task.num_classes, request.seed)
    frozen = len(model.blocks) - (request.last_blocks or 0)
    if frozen < 1:
        raise HoraError(
            f"a screen leaves at least one block frozen, got last_blocks {request.last_blocks} of {len(model.blocks)}: "
            "take fewer"
        )
    model.patch_embed = model.norm_pre = nn.Identity()
    model.cls_token = model.reg_token = model.pos_embed = None
    for index in range(frozen):
        model.blocks[index] = nn.Identity()
    for block in model.blocks[frozen:]:
        block.attn.fused_attn = False  # torch 2.13 has no vmap of its fused kernel on CPU
    load.set_head(model, head)
    method = methods.find(request.method).configured(request.options)
    examples = [seen.batch(members, request, step) for step in range(method.start.get("batches", 0))]
    return prepare(model.to(seen.hidden.device), method, seed=request.seed, examples=examples, loss=_start_loss)


def _start_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss that a start from examples differentiates: the one that is trained."""
    each = nn.functional.cross_entropy(model(batch["image"]), batch["label"], reduction="none")
    return (each * batch["weight"]).sum() / batch["weight"].sum().clamp(min=1)


@lru_cache(maxsize=1)
def _base(model: str, size: int) -> nn.Module:
    return load.timm_vit(model, size)


@final
class Stack:
    """Models alike but for their values, as one function whose values have a leading axis of seeds.

    Parameters
    ----------
    models
        Prepared for the same method with different seeds.
    device
        Where they are trained.
    """

    def __init__(self, models: Sequence[nn.Module], device: torch.device) -> None:
        self._model = models[0].to(device).eval()  # VB-LoRA looks at values in training
        values = [dict(chain(one.to(device).named_parameters(), one.named_buffers())) for one in models]
        self.trained, self._own, self._shared = {}, {}, {}
        for name, value in values[0].items():
            every = [found[name].detach() for found in values]
            if len({one.shape for one in every}) > 1:
                raise HoraError(f"seeds side by side have equal sizes, got {name}, which the data decide: run it alone")
            if value.requires_grad:
                self.trained[name] = torch.stack(every).requires_grad_()
            elif all(torch.equal(one, every[0]) for one in every):
                self._shared[name] = every[0]
            else:
                self._own[name] = torch.stack(every)

    @property
    def params_count(self) -> int:
        """Trained values of one seed."""
        return sum(value[0].numel() for value in self.trained.values())

    @property
    def total_params_count(self) -> int:
        """All values of one seed's model, without the blocks whose outputs are cached."""
        return sum(value.numel() for name, value in self._model.named_parameters() if ".original_module." not in name)

    def logits(self, hidden: torch.Tensor, *, shared: bool = False) -> torch.Tensor:
        """Logits ``(seeds, batch, classes)`` of ``(seeds, batch, seq, embed)``, or of one batch for all seeds."""

        def one(trained: Any, own: Any, hidden: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(self._model, {**self._shared, **trained, **own}, (hidden,))

        return torch.func.vmap(one, in_dims=(0, 0, None if shared else 0))(self.trained, self._own, hidden)

    @torch.no_grad()
    def score(self, hidden: torch.Tensor) -> np.ndarray:
        """Logits ``(seeds, examples, classes)`` of a whole split."""
        parts = [self.logits(part, shared=True) for part in hidden.split(EVAL_BATCH["images"])]
        return torch.cat(parts, dim=1).float().cpu().numpy()


def train(
    stack: Stack, asked: Sequence[Request], members: Sequence[np.ndarray], seen: Tokens, progress: Progress = silent
) -> tuple[np.ndarray, list[float]]:
    """Losses ``(steps, seeds)``, and the seconds that each step took a seed.

    Parameters
    ----------
    stack, asked
        What is trained, and the request of each of its seeds.
    members
        Numbers of the training examples of each seed.
    seen
        The split that they are numbers in.
    progress
        As for `hora_bench.run.run`.
    """
    recipe, curve, seconds = asked[0].recipe, [], []
    optimizer = torch.optim.AdamW(
        stack.trained.values(),
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
    )
    for step in range(recipe.steps):
        start = time.perf_counter()
        picked = [
            own[batch_indices(len(own), recipe.batch_size, step, one.seed)]
            for one, own in zip(asked, members, strict=True)
        ]
        rows = torch.from_numpy(np.stack(picked)).to(seen.hidden.device)
        logits, weight = stack.logits(seen.hidden[rows]), seen.weight[rows]
        each = nn.functional.cross_entropy(logits.transpose(1, 2), seen.label[rows], reduction="none")
        loss = (each * weight).sum(1) / weight.sum(1).clamp(min=1)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        optimizer.zero_grad()
        loss.sum().backward()  # each seed's loss depends on its own values alone
        optimizer.step()
        curve.append(loss.detach().cpu().numpy())
        seconds.append((time.perf_counter() - start) / len(asked))
        progress("screen", step + 1, recipe.steps, float(curve[-1].mean()))
    return np.stack(curve), seconds
