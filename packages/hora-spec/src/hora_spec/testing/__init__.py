"""The conformance kit: what an implementation of HoRA is checked with (``pip install hora-spec[testing]``).

A backend is a `Backend`, plain functions on NumPy arrays. ``check_*`` compare it with the reference, ``law_*`` with
itself; all take ``(backend, case, dtype)`` and return the worst error as a fraction of its bound.

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
    check_golden,
    check_grads,
    check_init,
    check_linear,
    check_linear_grads,
)
from hora_spec.testing.laws import (
    law_finite_differences,
    law_merged_forward,
    law_permutation,
    law_scale_and_shift,
    law_start,
)
from hora_spec.testing.merging import check_merge, check_merge_refuses, check_stored, stored_forms
from hora_spec.testing.vectorized import VECTORIZED

CHECKS = (
    check_init,
    check_factors,
    check_delta,
    check_linear,
    check_linear_grads,
    check_merge,
    check_merge_refuses,
    check_grads,
)
"""Every comparison with the reference."""

LAWS = (law_start, law_permutation, law_scale_and_shift, law_merged_forward, law_finite_differences)
"""Every law."""

__all__ = [
    "CHECKS",
    "LAWS",
    "LAYERS",
    "REFERENCE",
    "REGIMES",
    "SIZES",
    "VECTORIZED",
    "Backend",
    "Case",
    "Inputs",
    "LinearGrads",
    "check_delta",
    "check_factors",
    "check_golden",
    "check_grads",
    "check_init",
    "check_linear",
    "check_linear_grads",
    "check_merge",
    "check_merge_refuses",
    "check_stored",
    "corpus",
    "law_finite_differences",
    "law_merged_forward",
    "law_permutation",
    "law_scale_and_shift",
    "law_start",
    "stored_forms",
]
