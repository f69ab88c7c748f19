"""Least squares, the losses that measure recovery, and which sharing lets noise-free data tell the updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float
from scipy.optimize import OptimizeResult, least_squares

from hora_bench.experiments.theory.model import Data, Factors, Problem, Sharing, count_params, jacobian, owners, predict

MAX_STARTS: Final = 20
COARSE_SAMPLES: Final = 1000


@dataclass(frozen=True, slots=True)
class Fit:
    """A least-squares estimate.

    Attributes
    ----------
    factors
        Fitted factors of every head.
    starts
        Random starts used.
    reached
        Whether the squared error is at most that of the truth, as it is for the global minimum.
    """

    factors: Factors
    starts: int
    reached: bool


def _descend(problem: Problem, theta: np.ndarray, sharing: Sharing, heads: int, data: Data) -> OptimizeResult:
    """One descent of MINPACK's Levenberg-Marquardt with the hand-written Jacobian."""

    def residual(theta: np.ndarray) -> np.ndarray:
        return (predict(problem, problem.factors(theta, sharing, heads), data) - data.y).ravel()

    def slope(theta: np.ndarray) -> np.ndarray:
        return jacobian(problem, theta, sharing, heads, data)

    return least_squares(residual, theta, jac=slope, method="lm", max_nfev=400)


def fit(problem: Problem, sharing: Sharing, heads: int, data: Data, rng: np.random.Generator) -> Fit:
    """Least-squares estimate: Gaussian starts until the squared error is at most the truth's.

    A start first descends on the first 1000 samples, then on all of them. A single start would hide the effect
    behind local minima.
    """
    bound = np.sum((data.y - predict(problem, problem.truth, data)) ** 2) + 1e-12 * data.y.size
    best, lowest, starts = problem.truth, np.inf, 0
    while lowest > bound and starts < MAX_STARTS:
        starts += 1
        theta = rng.normal(size=count_params(sharing, heads))
        if len(data) > COARSE_SAMPLES:
            theta = _descend(problem, theta, sharing, heads, data.first(COARSE_SAMPLES)).x
        found = _descend(problem, theta, sharing, heads, data)
        if 2 * found.cost < lowest:
            best, lowest = problem.factors(found.x, sharing, heads), 2 * found.cost
    return Fit(best, starts, bool(lowest <= bound))


def losses(problem: Problem, factors: Factors, test: Data) -> dict[str, float]:
    """Distances from the truth, free of gauge: all are on the products ``B A^T``, never on A or B.

    Returns
    -------
    dict
        ``d2``: Voronoi loss; with one true head all fitted heads share its cell, where distances of the updates of Q
        and V enter squared if the cell has several heads, plain if it has one. ``value_error``, ``query_error``: mean
        Frobenius distance of an update from the true one. ``prediction_error``: root mean square on fresh inputs.
    """
    query, value = np.linalg.norm(factors.updates() - problem.truth.updates(), axis=(2, 3))
    power = 2 if len(query) > 1 else 1
    gap = predict(problem, factors, test) - predict(problem, problem.truth, test)
    return {
        "d2": float(np.sum(query**power + value**power)),
        "value_error": float(value.mean()),
        "query_error": float(query.mean()),
        "prediction_error": rms(gap),
    }


def rms(outputs: Float[np.ndarray, "samples width"]) -> float:
    """Root of the mean squared norm."""
    return float(np.sqrt(np.mean(np.sum(outputs**2, axis=1))))


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
