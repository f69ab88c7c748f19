"""Mutants of the generation: head embeddings, activation, gain."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hora_spec import reference
from hora_spec.spec import LAYER_NORM_EPS
from hora_spec.testing.checks import check_factors
from hora_spec.testing.mutants.mutant import Mutant
from hora_spec.testing.mutants.rewire import Activation, Embed, Gains, rewired

Array = NDArray[Any]


def _step(step: str, rule: str) -> Callable[[Embed | Activation | Gains], Mutant]:
    """Decorator: a wrong step of the generation becomes a mutant named by its docstring."""
    return lambda wrong: Mutant(
        str(wrong.__doc__).rstrip("."),
        rule,
        check_factors,
        "float32",
        functools.partial(rewired, **{step: wrong}),
    )


def _normalized(mean: Array, axis: int | tuple[int, ...] = 1, *, ddof: int = 0, eps: float = LAYER_NORM_EPS) -> Array:
    centred = mean - mean.mean(axis, keepdims=True)
    return centred / np.sqrt(mean.var(axis, ddof=ddof, keepdims=True) + eps)


def _then_normalized(mean: Array, normalize: bool) -> Array:
    return _normalized(mean) if normalize else mean


@_step("embed", "G1")
def ddof(groups: Array, normalize: bool) -> Array:
    """Variance of a sample, ddof 1."""
    return _normalized(groups.mean(1), ddof=1) if normalize else groups.mean(1)


@_step("embed", "G1")
def eps_outside(groups: Array, normalize: bool) -> Array:
    """Eps outside the root."""
    mean = groups.mean(1)
    wrong = (mean - mean.mean(1, keepdims=True)) / (mean.std(1, keepdims=True) + LAYER_NORM_EPS)
    return wrong if normalize else mean


@_step("embed", "G1")
def other_eps(groups: Array, normalize: bool) -> Array:
    """Eps 1e-6."""
    return _normalized(groups.mean(1), eps=1e-6) if normalize else groups.mean(1)


@_step("embed", "G1")
def along_rank(groups: Array, normalize: bool) -> Array:
    """Normalisation along rank."""
    return _normalized(groups.mean(1), axis=2) if normalize else groups.mean(1)


@_step("embed", "G1")
def whole_head(groups: Array, normalize: bool) -> Array:
    """Normalisation along head_embed and rank together."""
    return _normalized(groups.mean(1), axis=(1, 2)) if normalize else groups.mean(1)


@_step("embed", "G1")
def uncentred(groups: Array, normalize: bool) -> Array:
    """Normalisation without centring."""
    mean = groups.mean(1)
    return mean / np.sqrt((mean**2).mean(1, keepdims=True) + LAYER_NORM_EPS) if normalize else mean


@_step("embed", "G1")
def unnormalized(groups: Array, normalize: bool) -> Array:
    """No normalisation."""
    return groups.mean(1)


@_step("embed", "G1")
def always_normalized(groups: Array, normalize: bool) -> Array:
    """Normalisation although it is switched off."""
    return _normalized(groups.mean(1))


@_step("embed", "G2")
def modulo(groups: Array, normalize: bool) -> Array:
    """Groups of heads by modulo instead of blocks."""
    heads, group, *rest = groups.shape
    return _then_normalized(groups.reshape(group, heads, *rest).mean(0), normalize)


@_step("embed", "G2")
def mean_after(groups: Array, normalize: bool) -> Array:
    """Mean of a group after normalisation."""
    heads, group, *rest = groups.shape
    flat = groups.reshape(heads * group, *rest)
    return _then_normalized(flat, normalize).reshape(groups.shape).mean(1)


@_step("embed", "G2")
def first_of_group(groups: Array, normalize: bool) -> Array:
    """First embedding of a group instead of its mean."""
    return _then_normalized(groups[:, 0], normalize)


@_step("embed", "G2")
def sum_of_group(groups: Array, normalize: bool) -> Array:
    """Sum of a group instead of its mean."""
    return _then_normalized(groups.sum(1), normalize)


@_step("embed", "G2")
def one_for_all(groups: Array, normalize: bool) -> Array:
    """One embedding for all heads."""
    return _then_normalized(np.broadcast_to(groups[:1].mean(1), groups[:, 0].shape), normalize)


@_step("embed", "G2")
def heads_reversed(groups: Array, normalize: bool) -> Array:
    """Heads in reverse."""
    return _then_normalized(groups[::-1].mean(1), normalize)


@_step("activation", "G3")
def other_slope(name: str, u: Array) -> Array:
    """Leaky ReLU of slope 0.2."""
    return np.where(u > 0, u, 0.2 * u) if name == "leaky_relu" else reference.activation(name, u)


@_step("activation", "G3")
def relu_for_leaky(name: str, u: Array) -> Array:
    """ReLU for leaky ReLU."""
    return reference.activation("relu" if name == "leaky_relu" else name, u)


@_step("activation", "G3")
def tanh_gelu(name: str, u: Array) -> Array:
    """The tanh form of GELU."""
    wrong = u / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    return wrong if name == "gelu" else reference.activation(name, u)


@_step("activation", "G4")
def no_activation(name: str, u: Array) -> Array:
    """No activation in the hidden layer."""
    return u


@_step("gains", "G5")
def no_gain(gain_a: float, gain_b: float) -> tuple[float, float]:
    """No gain."""
    return 1.0, 1.0


@_step("gains", "G5")
def swapped_gains(gain_a: float, gain_b: float) -> tuple[float, float]:
    """Gains of A and B swapped."""
    return gain_b, gain_a


@_step("gains", "G5")
def squared_gain(gain_a: float, gain_b: float) -> tuple[float, float]:
    """Gain twice."""
    return gain_a**2, gain_b**2
