"""What a start of A from examples costs beside training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from hora_bench.backends import build, start_batches
from hora_bench.data.base import Batch
from hora_bench.methods import find
from hora_bench.request import Request

from .clock import Clock, ratio, summary, take_turns


def starts(
    asked: Mapping[str, Request], task: Any, batch: Batch, rounds: int, clock: Clock
) -> Iterator[dict[str, Any]]:
    """One record per method that starts from examples: its time, and that over a training step of the same method.

    Parameters
    ----------
    asked
        Method to request, of one backend.
    task, batch
        Where examples come from, and the batch of the step.
    rounds, clock
        Of the measurement. On JAX a start compiles its passes each time, as it does for a user.
    """
    for name, request in asked.items():
        if examples := start_batches(request, task, find(name).configured(request.options)):
            trained = build(request, task)
            sides = {"start": _start(request, task, examples), "step": partial(trained.step, batch, 1e-5, 0)}
            for run in sides.values():
                run()
            seconds = take_turns(sides, rounds, clock=clock)
            yield {
                "method": name,
                "batches_count": len(examples),
                **summary(seconds["start"]),
                "over_step": ratio(seconds["start"], seconds["step"]),
            }


def _start(request: Request, task: Any, examples: Sequence[Batch]) -> Callable[[], Any]:
    """Starts an adapter that is never trained, any number of times."""
    learner: Any = build(request, task)
    method = find(request.method).configured(request.options)
    if request.backend == "torch":
        from hora_bench.backends import torch_starts
        from hora_bench.backends.torch import placed, start_loss

        device = learner.accelerator.device
        given = [placed(example, device) for example in examples]
        return partial(torch_starts.joint, learner.model, method.start, given, start_loss(None))
    from hora_bench.backends.jax_methods import started

    model = learner.model
    return partial(started, model.base, model.plan, model.adapter(), method, examples, request.seed)
