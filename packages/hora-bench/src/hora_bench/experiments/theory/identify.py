"""Which sharing lets noise-free data tell the updates: two heads that split one true update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from .fit import fit, losses, rms
from .model import Factors, Problem, Sharing, owners, predict

SPLITS: Final = (1e-3, 1e-2, 1e-1)
INVISIBLE: Final = 1e-12
SAME: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Identification:
    """What noise-free data say about two heads that share one true update.

    Attributes
    ----------
    sharing
        Which vectors the heads share.
    split_change
        Root mean square change of the function, one entry per split of ``SPLITS``.
    split_order
        Log-log slope of that change in the split; ``None`` where it is zero up to rounding: the split is invisible.
    prediction_error, value_error
        The largest of independent noise-free fits.
    """

    sharing: Sharing
    split_change: list[float]
    split_order: float | None
    prediction_error: float
    value_error: float

    @property
    def identified(self) -> bool:
        """Whether equal functions came with equal updates."""
        return self.split_order is not None and max(self.prediction_error, self.value_error) < SAME


def split(problem: Problem, sharing: Sharing, size: float) -> Factors:
    """Two copies of the true head, one vector moved by ``+size`` in one and ``-size`` in the other.

    The vector is the one whose split moves the value update and as little else as the sharing allows: B_V, or A_V
    where B also serves Q, or the common B where A is common too.
    """
    true, owner = problem.truth, owners(sharing, 2)
    theta = np.zeros((owner.max() + 1, true.b_q.shape[1]))
    for part, vector in zip(owner, (true.b_q, true.a_q, true.b_v, true.a_v), strict=True):
        theta[part] = vector[0]
    theta[owner[3 if sharing == "b" else 2]] += np.outer([size, -size], np.ones(theta.shape[1]))
    return Factors.unpack(theta.ravel(), sharing, 2)


def identify(sharing: Sharing, *, fits: int = 12, samples: int = 300, seed: int = 0) -> Identification:
    """Split a true head by hand, then fit two heads to noise-free data from independent problems.

    Parameters
    ----------
    sharing
        ``"full"``, ``"a"``, ``"b"`` or ``"none"``.
    fits, samples, seed
        Problems fitted, noise-free samples of each, and the seed of both.

    Notes
    -----
    The head output is linear in the value update, so a split ``V +- d`` cancels in the mean of the two heads. Where
    the split also moves the attention weights, it shows at second order (paper, theory section).
    """
    problem = Problem.draw(np.random.default_rng(seed))
    data = problem.sample(samples, np.random.default_rng([seed, 0]), noise=0.0)
    changes = [rms(predict(problem, split(problem, sharing, size), data) - data.y) for size in SPLITS]
    worst = {"prediction_error": 0.0, "value_error": 0.0}
    for trial in range(1, fits + 1):
        rng = np.random.default_rng([seed, trial])
        problem = Problem.draw(rng)
        data = problem.sample(samples, rng, noise=0.0)
        measured = losses(problem, fit(problem, sharing, 2, data, rng).factors, data)
        worst = {name: max(value, measured[name]) for name, value in worst.items()}
    return Identification(
        sharing=sharing,
        split_change=changes,
        split_order=float(np.polyfit(np.log(SPLITS), np.log(changes), 1)[0]) if changes[-1] > INVISIBLE else None,
        **worst,
    )
