"""What a backend gives to training and scoring, and the two loops, which go on where a checkpoint is."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from hora_spec import HoraError
from safetensors.numpy import load_file, save

from hora_bench.cache import new_file
from hora_bench.data.base import Batch, Split, Task
from hora_bench.recipe import Recipe, batch_indices, kept_paths, step_rng

Arrays = dict[str, np.ndarray]
EVERY_S = 30.0


class DivergedError(HoraError):
    """The loss of a training step is not finite."""


class Learner(Protocol):
    """A model with its trainable part; one class for each backend."""

    @property
    def model(self) -> Any:
        """The model with its present parameters."""
        ...

    @property
    def depth(self) -> int:
        """Number of blocks of a vision transformer."""
        ...

    @property
    def params_count(self) -> int:
        """Number of trained values."""
        ...

    @property
    def total_params_count(self) -> int:
        """Number of all values, trained and frozen."""
        ...

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        ...

    def decided(self, answer: bool) -> bool:
        """The main process's answer, in every process."""
        ...

    def step(self, batch: Batch, learning_rate: float, step: int) -> float:
        """One optimiser step; the loss before it. A loss that is not finite changes nothing."""
        ...

    def outputs(self, batch: Batch) -> np.ndarray:
        """Logits ``(rows, classes)`` of images and sentences, or summed log-likelihoods ``(rows,)`` of responses."""
        ...

    def write(self, batch: Batch, *, end: int, new_tokens: int, beams: int) -> np.ndarray:
        """Ids ``(rows, new_tokens)`` that are written after prompts, `end` from the end on."""
        ...

    def peak_bytes(self, batch: Batch) -> int:
        """Most bytes that a training step holds at once, weights and moments included."""
        ...

    def device_peak_bytes(self) -> int:
        """Largest memory in use so far on an accelerator; 0 on CPU."""
        ...

    def state(self) -> Arrays:
        """Trained parameters and optimiser state."""
        ...

    def restore(self, state: Arrays) -> None:
        """Go back to an earlier `state`."""
        ...

    def save(self, directory: Path) -> str:
        """Write what was trained into an empty directory, and say in which format."""
        ...

    def first_nonfinite(self, batch: Batch) -> str:
        """The first trained parameter, or else the first module in the order of the calls, that is not finite."""
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


class Checkpoint:
    """The learner's state, its curve and what it returned for the batches scored so far, one file for all of them.

    Parameters
    ----------
    learner
        Whose state is kept; it goes on from the file's where there is one.
    path
        The file; None keeps nothing. All processes of a run read it, the main one writes it.
    every_s
        Seconds between writes.

    Attributes
    ----------
    curve
        Of the steps so far.
    rows
        One array for each batch scored so far.
    """

    def __init__(self, learner: Learner, path: Path | None = None, every_s: float = EVERY_S) -> None:
        self.path = path
        self.curve, self.rows = Curve(), []
        self._learner = learner
        self._every_s = every_s
        self._resume()
        self._saved = time.monotonic()

    def keep(self) -> None:
        """Save, if the last time is long ago."""
        if self.path is None:
            return
        # the main process says when: reading the state may need all processes in the same moment
        if self._learner.decided(time.monotonic() - self._saved > self._every_s):
            self.save()

    def save(self) -> None:
        """Write the file, whole or not at all; the earlier one stays if a value is not finite.

        Raises
        ------
        HoraError
            The disk is full.
        """
        if self.path is None:
            return
        # not ascontiguousarray, which gives scalars an axis: a resumed step would be another program, rounded otherwise
        state = {name: np.asarray(value, order="C") for name, value in self._learner.state().items()}
        self._saved = time.monotonic()
        if not self._learner.is_main or not all(np.isfinite(value).all() for value in state.values()):
            return
        arrays = {f"state.{name}": value for name, value in state.items()}
        arrays |= {"curve.loss": np.asarray(self.curve.loss), "curve.seconds": np.asarray(self.curve.seconds)}
        arrays |= {f"rows.{index:06d}": value for index, value in enumerate(self.rows)}
        with new_file(self.path) as temporary:
            temporary.write_bytes(save(arrays))  # save_file writes through a temporary of its own, which a kill leaves

    def _resume(self) -> None:
        if self.path is None or not self._learner.decided(self.path.exists()):
            return
        arrays: Arrays = {}
        with suppress(Exception):  # a checkpoint of another version is started over
            arrays = load_file(self.path)
        if "curve.loss" not in arrays:
            return
        self._learner.restore(_part(arrays, "state."))
        self.curve = Curve(arrays["curve.loss"].tolist(), arrays["curve.seconds"].tolist())
        self.rows = [value for _, value in sorted(_part(arrays, "rows.").items())]


def _part(arrays: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


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
    DivergedError
        The loss is not a number; the last state that is finite is kept in `checkpoint`.
    """
    checkpoint = checkpoint or Checkpoint(learner)
    curve = checkpoint.curve

    def read(step: int) -> Batch:
        batch = batch_of(task, split, members, recipe.batch_size, seed, step)
        if recipe.drop_path:
            batch["paths"] = kept_paths(learner.depth, recipe.batch_size, recipe.drop_path, seed, step)
        return batch

    for step, batch in _ahead(read, len(curve.loss), recipe.steps):
        start = time.perf_counter()
        loss = learner.step(batch, recipe.rate(step), step)
        seconds = time.perf_counter() - start
        if not np.isfinite(loss):
            checkpoint.save()
            path = checkpoint.path
            kept = f"; the last good state is in {path.name}" if path and path.exists() else ""
            raise DivergedError(
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


def batch_of(task: Task, split: Split, members: np.ndarray, batch_size: int, seed: int, step: int) -> Batch:
    """The examples of one step."""
    indices = members[batch_indices(len(members), batch_size, step, seed)]
    return task.train_batch(split, indices, step_rng(seed, step))


def _ahead(batch_of: Callable[[int], Batch], first: int, steps: int) -> Iterator[tuple[int, Batch]]:
    """Steps with their batches; the next batch is read while a step runs."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(batch_of, first) if first < steps else None
        for step in range(first, steps):
            batch = following.result() if following else batch_of(step)
            following = reader.submit(batch_of, step + 1) if step + 1 < steps else None
            yield step, batch


def predict(
    outputs: Callable[[Batch], np.ndarray],
    batches: Iterator[Batch],
    *,
    checkpoint: Checkpoint | None = None,
    skip: int = 0,
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
    skip
        So many of the checkpoint's first batches belong to an earlier call.
    progress
        Called with the number of rows done.
    """
    rows, stop = [] if checkpoint is None else checkpoint.rows, skip
    for stop, batch in enumerate(batches, skip + 1):
        if stop > len(rows):
            rows.append(outputs(batch))
            if checkpoint is not None:
                checkpoint.keep()
        progress(sum(map(len, rows[skip:stop])))
    return np.concatenate(rows[skip:stop])  # those behind belong to a later call
