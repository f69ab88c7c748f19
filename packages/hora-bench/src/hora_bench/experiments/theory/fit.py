"""Least squares by Levenberg-Marquardt with restarts, and the losses that measure recovery."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float
from scipy.optimize import OptimizeResult, least_squares

from .model import Data, Factors, Problem, Sharing, count_params, jacobian, predict

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
        return (predict(problem, Factors.unpack(theta, sharing, heads), data) - data.y).ravel()

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
            best, lowest = Factors.unpack(found.x, sharing, heads), 2 * found.cost
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
