"""What a backend gives to training and scoring."""

from typing import Any, Protocol

import numpy as np

from hora_bench.tasks.base import Batch

Arrays = dict[str, np.ndarray]


class Learner(Protocol):
    """A model with its trainable part; one class for each backend."""

    @property
    def model(self) -> Any:
        """The model with its present parameters."""
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
        """Logits ``(rows, classes)`` of images, or summed log-likelihoods ``(rows,)`` of responses."""
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

    def first_nonfinite(self, batch: Batch) -> str:
        """The first trained parameter, or else the first module in the order of the calls, that is not finite."""
        ...
