"""The training loop and the scoring loop: both go on where a checkpoint is."""

import time
from collections.abc import Callable, Iterator

import numpy as np
from hora_spec import HoraError

from hora_bench.tasks.base import Batch, Split, Task
from hora_bench.training.checkpoint import Checkpoint, Curve
from hora_bench.training.learner import Learner
from hora_bench.training.recipe import Recipe, batch_indices, step_rng


def fit(
    learner: Learner,
    task: Task,
    split: Split,
    recipe: Recipe,
    *,
    members: np.ndarray,
    seed: int,
    checkpoint: Checkpoint | None = None,
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
        Of an unfinished run; every step depends on its number alone, so a resumed run ends where an
        uninterrupted one does.
    progress
        Called with steps done, steps in total and the last loss.

    Raises
    ------
    HoraError
        The loss is not a number; the last state that is finite is kept in `checkpoint`.
    """
    checkpoint = checkpoint or Checkpoint(learner)
    curve = checkpoint.curve
    for step in range(len(curve.loss), recipe.steps):
        indices = members[batch_indices(len(members), recipe.batch_size, step, seed)]
        batch = task.train_batch(split, indices, step_rng(seed, step))
        start = time.perf_counter()
        loss = learner.step(batch, recipe.rate(step), step)
        seconds = time.perf_counter() - start
        if not np.isfinite(loss):
            checkpoint.save()
            path = checkpoint.path
            kept = f"; the last good state is in {path.name}" if path and path.exists() else ""
            raise HoraError(
                f"the loss must be finite, got {loss} at step {step} of {recipe.steps} "
                f"({learner.first_nonfinite(batch)}){kept}: "
                f"lower the learning rate, which is {recipe.learning_rate:g}"
            )
        curve.loss.append(loss)
        curve.seconds.append(seconds)
        progress(step + 1, recipe.steps, loss)
        checkpoint.keep()
    checkpoint.save()
    return curve


def predict(
    outputs: Callable[[Batch], np.ndarray],
    batches: Iterator[Batch],
    *,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> np.ndarray:
    """The outputs for all batches, one below the other.

    Parameters
    ----------
    outputs
        From a batch to an array with its rows.
    batches
        In an order that does not change; all are read, also those that are not run again.
    checkpoint
        Has the outputs of the first batches, if an earlier process was killed after them.
    progress
        Called with the number of rows done.
    """
    rows = [] if checkpoint is None else checkpoint.rows
    for index, batch in enumerate(batches):
        if index >= len(rows):
            rows.append(outputs(batch))
            if checkpoint is not None:
                checkpoint.keep()
        progress(sum(map(len, rows[: index + 1])))
    return np.concatenate(rows)
