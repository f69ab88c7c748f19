"""The hidden activations ``s`` and their moments, from which gains and bounds follow (spec G4, G5, I5)."""

import math
from collections.abc import Callable

LEAKY_RELU_SLOPE = 0.01
"""Slope of the leaky ReLU for negative input (paper section 4; spec G3)."""

PRE_ACTIVATION_VARIANCE = 1 / 3
"""Variance of ``b_in @ LN(head_embed)`` at the start: uniform weights of variance 1/(3e), input of squared norm e."""

_TANH_MEAN_ABS_NORMAL = 0.39029707851894057
"""E|tanh(u)| for u ~ N(0, 1/3); it has no elementary form (spec G5)."""


def _gelu_mean_square_uniform(c: float) -> float:
    # gelu(u)^2 + gelu(-u)^2 = u^2 (1 + erf(u / sqrt 2)^2) / 2; the erf^2 part is integrated by parts twice (spec I5)
    erf, exp, pi = math.erf, math.exp, math.pi
    bell = math.sqrt(2 / pi) * exp(-c * c / 2)
    e = erf(c / math.sqrt(2))
    integral = (
        c**3 / 3 * e * e
        + 2 / 3 * (c * c + 2) * bell * e
        - 5 / (3 * math.sqrt(pi)) * erf(c)
        + 2 * c * exp(-c * c) / (3 * pi)
    )
    return c * c / 12 + integral / (4 * c)


# Each entry: (E|s(u)| for u ~ N(0, sigma^2 = 1/3), E|s(u)| for u ~ U(-c, c), E[s(u)^2] for u ~ U(-c, c)).
_HALF_NORMAL = math.sqrt(2 * PRE_ACTIVATION_VARIANCE / math.pi)  # E|u| for u ~ N(0, 1/3)
_MOMENTS: dict[str, tuple[float, Callable[[float], float], Callable[[float], float]]] = {
    "leaky_relu": (
        (1 + LEAKY_RELU_SLOPE) / 2 * _HALF_NORMAL,
        lambda c: (1 + LEAKY_RELU_SLOPE) / 2 * c / 2,
        lambda c: (1 + LEAKY_RELU_SLOPE**2) / 2 * c * c / 3,
    ),
    "relu": (_HALF_NORMAL / 2, lambda c: c / 4, lambda c: c * c / 6),
    "gelu": (_HALF_NORMAL / 2, lambda c: c / 4, _gelu_mean_square_uniform),
    "sigmoid": (0.5, lambda c: 0.5, lambda c: 0.5 - math.tanh(c / 2) / (2 * c)),
    "tanh": (
        _TANH_MEAN_ABS_NORMAL,
        lambda c: math.log(math.cosh(c)) / c,
        lambda c: 1 - math.tanh(c) / c,
    ),
    "identity": (_HALF_NORMAL, lambda c: c / 2, lambda c: c * c / 3),
}

ACTIVATIONS = tuple(_MOMENTS)
"""Names of the offered activations; ``gelu`` is the exact (erf) form."""


def mean_abs_normal(activation: str) -> float:
    """``E|s(u)|`` for ``u ~ N(0, 1/3)``, the hidden pre-activation of a generated B at the start (spec G5)."""
    return _MOMENTS[activation][0]


def mean_abs_uniform(activation: str, bound: float) -> float:
    """``E|s(u)|`` for ``u ~ U(-bound, bound)``, the hidden pre-activation of a generated A (spec G5)."""
    return _MOMENTS[activation][1](bound)


def mean_square_uniform(activation: str, bound: float) -> float:
    """``E[s(u)^2]`` for ``u ~ U(-bound, bound)``, from which ``a_out``'s bound follows (spec I5)."""
    return _MOMENTS[activation][2](bound)
