"""The conformance kit: what an implementation of HoRA is checked with (``pip install hora-spec[testing]``).

A backend is a `Backend`, plain functions on NumPy arrays; ``check_*`` and ``law_*`` take it with a `Case` and a dtype.

>>> from hora_spec.testing import REFERENCE, check_delta, corpus
>>> max(check_delta(REFERENCE, case, "float64") for case in corpus())
0.0

Hypothesis draws cases from `hora_spec.testing.strategies`, the one module that needs it.
"""

from hora_spec.testing.backend import REFERENCE, Backend, LinearGrads
from hora_spec.testing.case import LAYERS, REGIMES, SIZES, Case, Inputs, corpus
from hora_spec.testing.checks import (
    check_delta,
    check_factors,
    check_grads,
    check_init,
    check_linear,
    check_linear_grads,
)

__all__ = [
    "LAYERS",
    "REFERENCE",
    "REGIMES",
    "SIZES",
    "Backend",
    "Case",
    "Inputs",
    "LinearGrads",
    "check_delta",
    "check_factors",
    "check_grads",
    "check_init",
    "check_linear",
    "check_linear_grads",
    "corpus",
]
