"""Training steps, inference, generation, merging and export of every contender."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Final, Literal

import numpy as np
from hora_spec import HoraError
from pydantic import Field

from hora_bench.backends import build, check_device
from hora_bench.data.base import Batch
from hora_bench.request import Request, vary
from hora_bench.setting import Setting

from .clock import CLOCKS, Clock, ratio, summary, take_turns
from .operations import inference, operations
from .random_text import NAME, RESPONSE, RandomText
from .starts import starts

TORCH: Final = ("linear-probe", "lora", "dora", "vera", "mh-lora", "hora", "hora-residual", "hora-generated-a")
JAX: Final = ("linear-probe", "lora", "mh-lora", "hora", "hora-residual", "hora-generated-a")
FROZEN: Final = "linear-probe"
PLAIN: Final = (FROZEN, "full")
ALL: Final = """\
Contenders take turns in one process; ratios are taken within a round. Quartiles, not intervals.
Peak: the most that one training step holds, weights, gradients and moments included: torch on CPU, the running sum of \
its allocations; torch on a GPU, the allocator's own count; JAX, what XLA plans.
The first step holds compilation on JAX and allocation on torch; compile_s is what it takes beyond a later step on JAX.\
"""
IMAGES: Final = """\
frozen is the linear probe: the backbone's forward pass and the head, no backward pass through the backbone.
Peers adapt Q and V of a fused qkv that is split in three for them, HoRA its slices: part of a difference is the split.\
"""
TEXT: Final = """\
frozen, in inference, is the model of full fine-tuning. Tokens are random, the loss is on the last 4 of each sequence.\
"""


def speed(
    setting: Setting,
    *,
    torch: Sequence[str] = TORCH,
    jax: Sequence[str] = JAX,
    seq: Annotated[int, Field(gt=RESPONSE)] = 128,
    rounds: Annotated[int, Field(ge=1)] = 9,
    clock: Clock = "wall",
    device: Literal["cpu", "cuda"] = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Time everything a user waits for.

    Parameters
    ----------
    setting
        Model, batch, and image size or, for language models, the task ``random-text``.
    torch, jax
        Methods of each backend. References are ``lora`` and the frozen model: ``linear-probe``, or for the inference of
        a language model ``full``.
    seq
        Tokens of a sequence of ``random-text``.
    rounds, clock
        Of every measurement.
    device
        ``"cpu"``, or ``"cuda"`` for the first GPU.
    progress
        Called with rounds done and in total.

    Returns
    -------
    dict
        ``setting``; ``steps``, per contender time, ratios, throughput, memory and compilation; ``inference``, adapted
        and merged; ``operations``, generation, merge and export; ``starts``, of A from examples; ``notes``.

    Raises
    ------
    HoraError
        A backend does not reach the device, or the clock or the dtype does not fit.
    """
    text = setting.base.task == NAME
    base = setting.base.replace(image_size_px=None, scoring="log-likelihood") if text else setting.base
    contenders = {backend: methods for backend, methods in (("torch", torch), ("jax", jax)) if methods}
    _check(base, contenders, clock, device)  # before weights are fetched
    task = RandomText(seq) if text else setting.load(base.task)
    batch = task.train_batch("train", np.arange(base.batch_size), np.random.default_rng(0))
    stepped = _count(2 * rounds * len(contenders), progress)
    result: dict[str, Any] = {"steps": [], "inference": [], "operations": [], "starts": []}
    for backend, methods in contenders.items():
        asked = {name: vary(base, backend=backend, method=name, device=device) for name in methods}
        result["starts"] += [{"backend": backend, **one} for one in starts(asked, task, batch, rounds, clock)]
        learners = {name: build(request, task) for name, request in asked.items()}
        result["steps"] += _steps(backend, learners, batch, rounds, clock, stepped)
        result["inference"] += _inference(backend, learners, batch, rounds, clock, stepped)
        result["operations"] += [
            {"backend": backend, "method": name, **record}
            for name, learner in learners.items()
            for record in _operations(learner, rounds, clock)
        ]
        del learners
        gc.collect()
    measured = {"rounds": rounds, "clock": clock, "device": _name_of(device)}
    measured |= {"seq": seq} if task.kind == "text" else {}
    notes = [*ALL.splitlines(), *(TEXT if task.kind == "text" else IMAGES).splitlines()]
    return {"setting": {**setting.base.model_dump(), **measured}, **result, "notes": notes}


def _name_of(device: str) -> str:
    """What a GPU is called."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else device


def _check(base: Request, contenders: Mapping[str, Sequence[str]], clock: Clock, device: str) -> None:
    if not contenders:
        raise HoraError("speed is of one method or more, got none: name some in torch or jax")
    if base.dtype != "float32" and base.image_size_px is not None:
        raise HoraError(f"image models are timed in float32, got {base.dtype}: leave it out, or time a language model")
    if clock == "cpu" and device != "cpu":
        raise HoraError(f"processor seconds say nothing about a GPU, got --cpu-clock with --device {device}: drop one")
    for backend in contenders:
        check_device(backend, device)


def _count(total: int, progress: Callable[[int, int], None]) -> Callable[..., None]:
    """A callback that counts its calls."""
    done = count(1)
    return lambda *_: progress(next(done), total)


def _steps(
    backend: str, learners: dict[str, Any], batch: Batch, rounds: int, clock: Clock, stepped: Callable[..., None]
) -> list[dict[str, Any]]:
    """One record per method: time of a training step and what belongs to it."""
    first = {}
    for name, learner in learners.items():
        start = CLOCKS[clock]()
        learner.step(batch, 1e-5, 0)
        first[name] = CLOCKS[clock]() - start
        learner.step(batch, 1e-5, 1)
    seconds = take_turns(
        {name: partial(learner.step, batch, 1e-5, 2) for name, learner in learners.items()},
        rounds,
        clock=clock,
        progress=stepped,
    )
    peak = {name: learner.peak_bytes(batch) for name, learner in learners.items()}
    records = []
    for name, learner in learners.items():
        times = summary(seconds[name])
        record: dict[str, Any] = {"backend": backend, "method": name, "params_count": learner.params_count, **times}
        record["examples_per_s"] = round(len(batch["label"]) / times["median_s"], 1)
        if "tokens" in batch:
            record["tokens_per_s"] = round(batch["tokens"].size / times["median_s"], 1)
        for label, reference in (("lora", "lora"), ("frozen", FROZEN)):
            if reference in seconds:
                record[f"over_{label}"] = ratio(seconds[name], seconds[reference])
        record["peak_mib"] = round(peak[name] / 2**20, 1)
        if "lora" in peak:
            record["peak_over_lora"] = round(peak[name] / peak["lora"], 4)
        record["first_step_s"] = round(first[name], 3)
        if backend == "jax":
            record["compile_s"] = round(first[name] - times["median_s"], 3)
        records.append(record)
    return records


def _inference(
    backend: str, learners: dict[str, Any], batch: Batch, rounds: int, clock: Clock, stepped: Callable[..., None]
) -> list[dict[str, Any]]:
    """One record per method: a forward pass adapted and, where the method merges, merged."""
    passes = {}
    for name, learner in learners.items():
        for form, run in inference(learner, batch).items():
            run()
            passes[name, form] = run
    named = {f"{name}/{form}": run for (name, form), run in passes.items()}
    seconds = take_turns(named, rounds, clock=clock, progress=stepped)
    records = []
    for name, form in passes:
        own, frozen = seconds[f"{name}/{form}"], [plain for plain in PLAIN if (plain, "adapted") in passes]
        record: dict[str, Any] = {"backend": backend, "method": name, "form": form, **summary(own)}
        if frozen:
            record["over_frozen"] = ratio(own, seconds[f"{frozen[0]}/adapted"])
        records.append(record)
    return records


def _operations(learner: Any, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        named = operations(learner, folder)
        for run in named.values():
            run()
        seconds = take_turns(named, rounds, clock=clock) if named else {}
    return [{"operation": name, **summary(values)} for name, values in seconds.items()]
