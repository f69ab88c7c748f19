"""What an unfinished run has so far, in memory and now and then on disk."""

import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from hora_bench.cache import new_file
from hora_bench.training.learner import Arrays, Learner

EVERY_S = 30.0


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
