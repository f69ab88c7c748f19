"""The training loop: steps a learner, keeps checkpoints, stops on a loss that is no number."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from hora_spec import HoraError
from safetensors.numpy import load_file, save

from hora_bench.cache import new_file
from hora_bench.tasks.base import Batch, Score, Split, Task
from hora_bench.training.recipe import Recipe, batch_indices, step_rng

Arrays = dict[str, np.ndarray]
CHECKPOINT_EVERY_S = 30.0


class Learner(Protocol):
    """A model with its trainable part, as the loop sees it; one class for each backend."""

    def step(self, batch: Batch, learning_rate: float, step: int) -> float:
        """One optimiser step; the loss before it."""
        ...

    def outputs(self, batch: Batch) -> np.ndarray:
        """Logits ``(rows, classes)`` of images, or summed log-likelihoods ``(rows,)`` of responses."""
        ...

    def state(self) -> Arrays:
        """Trained parameters and optimiser state."""
        ...

    def restore(self, state: Arrays) -> None:
        """Go back to an earlier `state`."""
        ...

    def nonfinite(self) -> str:
        """The first trained parameter that is not finite, or where the loss came from."""
        ...


@dataclass(slots=True)
class Curve:
    """What training measured, one entry a step."""

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def step_time_s(self) -> float:
        """Median time of a step, the first (compilation, allocation) left out."""
        return float(np.median(self.seconds[1:] or self.seconds or [float("nan")]))


def fit(
    learner: Learner,
    task: Task,
    split: Split,
    recipe: Recipe,
    *,
    members: np.ndarray,
    seed: int,
    checkpoint: Path | None = None,
    every_s: float = CHECKPOINT_EVERY_S,
    progress: Callable[[int, int, float], None] = lambda done, total, loss: None,
) -> Curve:
    """Train for ``recipe.steps`` steps, or for those that are left after `checkpoint`.

    Parameters
    ----------
    learner, task, split, recipe
        What learns from what, and how.
    members
        Numbers of the training examples to use.
    seed
        Of data order and augmentation.
    checkpoint
        File for the state of an unfinished run; every step depends on its number alone, so a resumed run
        ends where an uninterrupted one does.
    every_s
        Seconds between checkpoints.
    progress
        Called with steps done, steps in total and the last loss.

    Raises
    ------
    HoraError
        The loss is not a number; the last good state is kept in `checkpoint`.
    """
    curve = _resume(learner, checkpoint)
    saved = time.monotonic()
    for step in range(len(curve.loss), recipe.steps):
        indices = members[batch_indices(len(members), recipe.batch_size, step, seed)]
        batch = task.train_batch(split, indices, step_rng(seed, step))
        start = time.perf_counter()
        loss = learner.step(batch, recipe.rate(step), step)
        curve.seconds.append(time.perf_counter() - start)
        if not np.isfinite(loss):
            kept = f"; the last good state is in {checkpoint.name}" if checkpoint and checkpoint.exists() else ""
            raise HoraError(
                f"the loss must be finite, got {loss} at step {step} of {recipe.steps} ({learner.nonfinite()}){kept}: "
                f"lower the learning rate, which is {recipe.learning_rate:g}"
            )
        curve.loss.append(loss)
        progress(step + 1, recipe.steps, loss)
        if checkpoint and time.monotonic() - saved > every_s:
            _save(learner, curve, checkpoint)
            saved = time.monotonic()
    return curve


def evaluate(
    learner: Learner,
    task: Task,
    split: Split,
    batch_size: int,
    *,
    progress: Callable[[int], None] = lambda rows: None,
) -> Score:
    """Score of the learner on all examples of a split."""
    rows = list(_rows(learner, task, split, batch_size, progress))
    return task.score(split, np.concatenate(rows))


def _rows(
    learner: Learner, task: Task, split: Split, batch_size: int, progress: Callable[[int], None]
) -> Iterator[np.ndarray]:
    for batch in task.eval_batches(split, batch_size):
        yield learner.outputs(batch)
        progress(batch_size)


def _save(learner: Learner, curve: Curve, path: Path) -> None:
    # not ascontiguousarray, which gives scalars an axis: a resumed step would be another program and round differently
    arrays = {f"state.{name}": np.asarray(value, order="C") for name, value in learner.state().items()}
    if not all(np.isfinite(value).all() for value in arrays.values()):
        return  # the loss was finite, what came of the step is not: the earlier checkpoint is the last good one
    arrays |= {"curve.loss": np.asarray(curve.loss), "curve.seconds": np.asarray(curve.seconds)}
    with new_file(path) as temporary:
        temporary.write_bytes(save(arrays))  # save_file would write through one more temporary file, kept by a kill


def _resume(learner: Learner, path: Path | None) -> Curve:
    if path is None or not path.exists():
        return Curve()
    arrays: Arrays = {}
    with suppress(Exception):  # a checkpoint of another version is started over
        arrays = load_file(path)
    if "curve.loss" not in arrays:
        return Curve()
    learner.restore({name.removeprefix("state."): value for name, value in arrays.items() if name.startswith("state.")})
    return Curve(arrays["curve.loss"].tolist(), arrays["curve.seconds"].tolist())
