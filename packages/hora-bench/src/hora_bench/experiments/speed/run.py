"""Training steps, inference, generation, merging and export of every contender."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

from hora_bench.experiments.setting import Setting, vary
from hora_bench.runs import build
from hora_bench.tasks.base import Batch

from .clock import Clock, ratio, summary, take_turns
from .operations import inference, operations

TORCH: Final = ("linear-probe", "lora", "dora", "vera", "mh-lora", "hora", "hora-residual", "hora-generated-a")
JAX: Final = ("linear-probe", "lora", "mh-lora", "hora", "hora-residual", "hora-generated-a")
FROZEN: Final = "linear-probe"
NOTES: Final = tuple(
    """\
Contenders take turns in one process; ratios are taken within a round. Quartiles, not intervals.
frozen is the linear probe: the backbone's forward pass and the head, no backward pass through the backbone.
Peers adapt Q and V of a fused qkv that is split in three for them, HoRA its slices: part of a difference is the split.
Kept bytes: torch, what a forward pass keeps for backward; JAX, the temporary memory XLA plans for a whole step. They \
compare methods of one backend, not backends.
The first step holds compilation on JAX and allocation on torch.\
""".splitlines()
)


def speed(
    setting: Setting,
    *,
    torch: Sequence[str] = TORCH,
    jax: Sequence[str] = JAX,
    rounds: int = 9,
    clock: Clock = "wall",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Time everything a user waits for.

    Parameters
    ----------
    setting
        Model, image size and batch.
    torch, jax
        Methods of each backend; ``linear-probe`` and ``lora`` are the references of their backend.
    rounds, clock
        Of every measurement.
    progress
        Called with rounds done and in total.

    Returns
    -------
    dict
        ``setting``; ``steps``, per contender time, ratios, throughput, memory and first step; ``inference``, adapted
        and merged; ``operations``, generation, merge and export; ``notes``.
    """
    task = setting.load(setting.base.task)
    rows = np.arange(setting.base.batch_size)
    batch = task.train_batch("train", rows, np.random.default_rng(0))
    result: dict[str, Any] = {"setting": {**setting.base.model_dump(), "rounds": rounds, "clock": clock}}
    result |= {"steps": [], "inference": [], "operations": [], "notes": list(NOTES)}
    total = 2 * rounds * ((len(torch) > 0) + (len(jax) > 0))
    done = 0

    def stepped(*_: int) -> None:
        nonlocal done
        done += 1
        progress(done, total)

    for backend, methods in (("torch", torch), ("jax", jax)):
        if not methods:
            continue
        asked = {name: vary(setting.base, backend=backend, method=name) for name in methods}
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
    return result


def _steps(
    backend: str, learners: dict[str, Any], batch: Batch, rounds: int, clock: Clock, stepped: Callable[..., None]
) -> list[dict[str, Any]]:
    """One record per method: time of a training step and what belongs to it."""
    first = {}
    for name, learner in learners.items():
        start = time.perf_counter()
        learner.step(batch, 1e-5, 0)
        first[name] = time.perf_counter() - start
        learner.step(batch, 1e-5, 1)
    seconds = take_turns(
        {name: partial(learner.step, batch, 1e-5, 2) for name, learner in learners.items()},
        rounds,
        clock=clock,
        progress=stepped,
    )
    kept = {name: learner.memory_bytes(batch) for name, learner in learners.items()}
    records = []
    for name, learner in learners.items():
        times = summary(seconds[name])
        record: dict[str, Any] = {"backend": backend, "method": name, "params_count": learner.params_count, **times}
        record["examples_per_s"] = round(len(batch["label"]) / times["median_s"], 1)
        for label, reference in (("lora", "lora"), ("frozen", FROZEN)):
            if reference in seconds:
                record[f"over_{label}"] = ratio(seconds[name], seconds[reference])
        record |= {"first_step_s": round(first[name], 3), "kept_bytes": kept[name]}
        if "lora" in kept:
            record["kept_over_lora"] = round(kept[name] / kept["lora"], 3)
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
        own, frozen = seconds[f"{name}/{form}"], seconds.get(f"{FROZEN}/adapted")
        record: dict[str, Any] = {"backend": backend, "method": name, "form": form, **summary(own)}
        if frozen is not None:
            record["over_frozen"] = ratio(own, frozen)
        records.append(record)
    return records


def _operations(learner: Any, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    with TemporaryDirectory() as folder:
        named = operations(learner, folder)
        for run in named.values():
            run()
        seconds = take_turns(named, rounds, clock=clock) if named else {}
    return [{"operation": name, **summary(values)} for name, values in seconds.items()]
