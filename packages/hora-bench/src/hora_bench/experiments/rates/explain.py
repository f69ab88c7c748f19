"""Whether an eigenvalue orders the choices as their largest good rates do, with what luck could do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

from .widths import bounds

EXPLAINS: Final = -0.5  # rank correlation that the whole interval has to be below
LUCK: Final = 0.05
ORDERS: Final = 10_000  # orders of up to seven choices are all tried
Word = Literal["explains", "does not explain", "not resolved"]


@dataclass(frozen=True, slots=True)
class Explained:
    """A rank correlation over choices, its mean over tasks.

    Attributes
    ----------
    rho, low, high
        Spearman's, and its percentile interval over seeds; None where all choices are alike.
    p_value
        Part of all orders of the choices, the same on all tasks, whose correlation is as low.
    needed
        The weakest correlation that is not luck among so many choices; None where none could be.
    word
        By gates that are stated beforehand.
    """

    rho: float | None
    low: float | None
    high: float | None
    p_value: float | None
    needed: float | None
    word: Word


def correlation(eigenvalues: Float[np.ndarray, "tasks choices"], rates: Float[np.ndarray, "tasks choices"]) -> float:
    """Mean over tasks of Spearman's rank correlation over choices; not a number where one is constant."""
    ranks = [stats.rankdata(values, axis=1) for values in (eigenvalues, rates)]
    centred = [one - one.mean(1, keepdims=True) for one in ranks]
    norms = [np.sqrt((one**2).sum(1)) for one in centred]
    with np.errstate(invalid="ignore"):
        return float(((centred[0] * centred[1]).sum(1) / (norms[0] * norms[1])).mean())


def explained(
    eigenvalues: Float[np.ndarray, "tasks choices"],
    rates: Float[np.ndarray, "tasks choices"],
    drawn: tuple[Float[np.ndarray, "draws tasks choices"], Float[np.ndarray, "draws tasks choices"]],
) -> Explained:
    """Whether higher eigenvalues go with lower rates.

    Parameters
    ----------
    eigenvalues, rates
        Of every choice on every task: the largest eigenvalue, and the rate that it may explain.
    drawn
        Both for every resampling of seeds.

    Notes
    -----
    The interval is that of these choices with other seeds. Six choices are few and were not drawn from anything, so
    that luck is judged by permuting them: a correlation has to be outside of what orders of them give.
    """
    rho = correlation(eigenvalues, rates)
    if not np.isfinite(rho):
        return Explained(None, None, None, None, None, "not resolved")
    resampled = np.array([correlation(*one) for one in zip(*drawn, strict=True)])
    low, high = bounds(np.nan_to_num(resampled))
    tested = stats.permutation_test(
        (np.arange(eigenvalues.shape[1]),),
        lambda order: correlation(eigenvalues[:, order], rates),
        permutation_type="pairings",
        vectorized=False,
        n_resamples=ORDERS,
        alternative="less",
        rng=np.random.default_rng(0),
    )
    null = np.sort(tested.null_distribution)
    rare = null[np.searchsorted(null, null + 1e-9, side="right") <= LUCK * len(null)]
    p_value = float(tested.pvalue)
    word: Word = "not resolved"
    if high < EXPLAINS and p_value <= LUCK:
        word = "explains"
    elif low > EXPLAINS and len(rare):  # what could not have said yes does not say no
        word = "does not explain"
    rounded = (round(value, 3) for value in (rho, low, high, p_value))
    return Explained(*rounded, round(float(rare[-1]), 3) if len(rare) else None, word)
