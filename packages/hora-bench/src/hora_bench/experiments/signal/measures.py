"""How much of the gradient's signal heads have in common: on the side of outputs, and on that of inputs.

The gradient of a batch is the signal, its mean over all data, and noise. The mean of a product of gradients of two
disjoint batches is the product of signals, so noise adds nothing to what is measured here, on average.

einsum legend: b batch, h and g head, k and l head_dim, d embed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats
from scipy.linalg import eigh

from hora_bench.stats import LEVEL

Gradients = Float[np.ndarray, "batches heads head_dim embed"]
Products = Float[np.ndarray, "heads heads head_dim head_dim"]
Numbers = dict[str, float]
DRAWS: Final = 100


def products(gradients: Gradients) -> Products:
    """Estimate of ``S_h S_g^T`` for the signals S of all pairs of heads."""
    batches, heads, head_dim, embed = gradients.shape
    rows = gradients.reshape(batches, heads * head_dim, embed)
    total = rows.sum(0)
    crossed = total @ total.T - sum(one @ one.T for one in rows)
    split = crossed.reshape(heads, head_dim, heads, head_dim).transpose(0, 2, 1, 3)
    return split / (batches * (batches - 1))


def energy(images: Float[np.ndarray, "batches ..."]) -> float:
    """Estimate of the squared norm of the signal, seen through any linear map of the gradients."""
    batches = len(images)
    return float((images.sum(0) ** 2).sum() - (images**2).sum()) / (batches * (batches - 1))


def plain_frame(heads: int, head_dim: int) -> Products:
    """Heads compared coordinate by coordinate, as a generator that serves all of them sees them."""
    return np.tile(np.eye(head_dim), (heads, heads, 1, 1))


def common_frame(maps: Float[np.ndarray, "heads head_dim embed"]) -> Products:
    """Heads compared by what their coordinates do: K of each head reads its Q, the output map of each head its V.

    A head's own coordinates are arbitrary: those of Q and K, or of V and the output map, may be turned together.
    """
    return np.einsum("hkd,gld->hgkl", maps, maps, optimize=True)


def similarity(of: Products, frame: Products) -> float:
    """Mean inner product of the signals of two heads, over the mean of a signal with itself: 1 if all are equal."""
    gram = (of * frame).sum((-1, -2))
    own = np.eye(len(gram), dtype=bool)
    return float(gram[~own].mean() / gram[own].mean())


def turned(of: Products, rng: np.random.Generator) -> Products:
    """The same with the coordinates of every head turned at random: heads that have nothing to do with each other."""
    heads, head_dim = of.shape[0], of.shape[-1]
    turns, scale = np.linalg.qr(rng.normal(size=(heads, head_dim, head_dim)))
    turns *= np.sign(np.diagonal(scale, axis1=1, axis2=2))[:, None]  # else not uniform (Mezzadri 2007)
    return turns[:, None] @ of @ turns[None].swapaxes(-1, -2)


def basis(signal: Float[np.ndarray, "n d"], rank: int) -> Float[np.ndarray, "d rank"]:
    """Orthonormal directions that hold most of a matrix's energy, of the space of its rows."""
    rows, width = signal.shape
    last = [max(0, min(rows, width) - rank), min(rows, width) - 1]
    if rows < width:  # the smaller of two Gram matrices
        left = eigh(signal @ signal.T, subset_by_index=last)[1]
        return np.linalg.qr(signal.T @ left)[0]
    return eigh(signal.T @ signal, subset_by_index=last)[1]


def held(
    gradients: Mapping[str, Float[np.ndarray, "batches heads n d"]], rank: int, half: Bool[np.ndarray, " batches"]
) -> dict[str, Numbers]:
    """Part of the signal, in batches not looked at, that lies in `rank` directions found in the others.

    Parameters
    ----------
    gradients
        Of each projection.
    rank
        Number of directions.
    half
        Which of the batches find bases first. The same where one is left out: else an interval by leaving out would
        count what another division of all batches changes.

    Returns
    -------
    dict
        Projection to numbers: ``one`` basis for all heads, ``own``, one a head, and ``together``, one for all heads of
        all projections. Each half of the batches finds bases once and judges them once.
    """
    found: dict[str, dict[str, list[float]]] = {
        p: {name: [] for name in ("one", "own", "together", "all")} for p in gradients
    }
    for finds in (half, ~half):
        means = {p: value[finds].mean(0) for p, value in gradients.items()}
        units = [mean.reshape(-1, mean.shape[-1]) / np.linalg.norm(mean) for mean in means.values()]
        together = basis(np.concatenate(units), rank)
        for p, value in gradients.items():
            judges, mean = value[~finds], means[p]
            own = np.stack([basis(head, rank) for head in mean])
            found[p]["one"].append(energy(judges @ basis(mean.reshape(-1, mean.shape[-1]), rank)))
            found[p]["own"].append(energy(judges @ own))
            found[p]["together"].append(energy(judges @ together))
            found[p]["all"].append(energy(judges))
    return {
        p: {name: sum(parts[name]) / sum(parts["all"]) for name in ("one", "own", "together")}
        for p, parts in found.items()
    }


def measure(
    gradients: Mapping[str, Gradients], frames: Mapping[str, Products], rank: int, half: Bool[np.ndarray, " batches"]
) -> dict[str, dict[str, float]]:
    """Everything of one layer: projection to numbers.

    Parameters
    ----------
    gradients
        Of each projection.
    frames
        `common_frame` of each projection.
    rank, half
        As for `held`.
    """
    inputs = held(gradients, rank, half)
    outputs = held({p: value.swapaxes(2, 3) for p, value in gradients.items()}, rank, half)
    return {
        p: {
            "signal": energy(value) / float((value**2).sum() / len(value)),
            "similarity": similarity(of := products(value), plain_frame(value.shape[1], value.shape[2])),
            "similarity_in_frame": similarity(of, frames[p]),
            **{f"inputs_{name}": number for name, number in inputs[p].items()},
            **{f"outputs_{name}": number for name, number in outputs[p].items() if name != "together"},
        }
        for p, value in gradients.items()
    }


def unrelated(of: Sequence[Products], frames: Sequence[Sequence[Products]], seed: int) -> list[tuple[float, float]]:
    """Ranges of mean similarities over layers, at 95 %, of heads whose coordinates are turned at random.

    Parameters
    ----------
    of
        Of every layer.
    frames
        Of every layer, the frames to compare in: a range for each.
    seed
        Of the turns.
    """
    rng, means = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        drawn = [turned(one, rng) for one in of]
        found = [[similarity(one, frame) for frame in own] for one, own in zip(drawn, frames, strict=True)]
        means.append(np.mean(found, axis=0))
    low, high = np.percentile(means, [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def jackknife(numbers: Callable[[np.ndarray], np.ndarray], batches: int) -> np.ndarray:
    """Half the width of 95 % intervals of values from all batches, Student's t of leaving out one at a time.

    Parameters
    ----------
    numbers
        From the numbers of batches that may be used to an array of values.
    batches
        How many there are.
    """
    without = np.stack([numbers(np.delete(np.arange(batches), one)) for one in range(batches)])
    deviation = np.sqrt((batches - 1) / batches * ((without - without.mean(0)) ** 2).sum(0))
    return deviation * float(stats.t.ppf((1 + LEVEL) / 2, batches - 1))


def rounded(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Four digits behind the point."""
    return {name: round(float(value), 4) for name, value in numbers.items()}
