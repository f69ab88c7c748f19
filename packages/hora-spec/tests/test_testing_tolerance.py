"""The tolerance holds for honest arithmetic, is not loose, and knows where digits are lost."""

from operator import attrgetter

import numpy as np
import pytest
from hora_spec import AdapterSpec, reference
from hora_spec.testing import (
    CHECKS,
    LAWS,
    LAYERS,
    REGIMES,
    SIZES,
    VECTORIZED,
    Case,
    corpus,
    law_finite_differences,
    tolerance,
)
from hora_spec.testing.rounding import FORMATS, Rounded, either, join, total

EXACT = {"check_init", "check_merge", "check_merge_refuses", "law_start", "law_permutation"}
NAME = attrgetter("__name__")
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("check", [check for check in CHECKS + LAWS if check.__name__ not in EXACT], ids=NAME)
def test_an_honest_backend_uses_a_hundredth_of_the_bound_somewhere(check, dtype):
    smallest = 0.001 if check is law_finite_differences and dtype == "float64" else 0.01  # the differences' own error
    assert smallest < max(check(VECTORIZED, case, dtype) for case in corpus()) <= 1


@pytest.mark.parametrize("regime", REGIMES)
def test_the_analysis_computes_the_reference(regime):
    fmt = FORMATS["float64"]
    for base in corpus():
        case = Case(base.spec, base.layer, base.seed, regime)
        inputs = case.inputs("float64")
        of = (case.spec, case.layer, inputs.params)
        for p, (a, b) in tolerance.factors(*of, fmt).items():
            expected = reference.factors(*of)[p]
            np.testing.assert_allclose(a.value, expected.a, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(b.value, expected.b, rtol=1e-10, atol=1e-8)
        for key, value in reference.grads(*of, inputs.delta_cotangent).items():
            got = tolerance.grads(*of, inputs.delta_cotangent, fmt)[key]
            assert (np.abs(got.value - value) <= 2 * got.error).all(), key


def test_a_constant_column_loses_everything_in_float32_and_little_in_float64():
    spec = AdapterSpec(**SIZES[0])
    layer = LAYERS["equal"]
    params = Case(spec, layer, regime="constant").inputs("float64").params
    params["head_embed"] = params["head_embed"] * 2**14
    error = {
        name: max(float(b.error.max()) for _, b in tolerance.factors(spec, layer, params, FORMATS[name]).values())
        for name in ("float32", "float64")
    }
    assert error["float32"] > 0.1
    assert error["float64"] < 1e-6


def test_the_bound_of_a_well_conditioned_case_keeps_four_digits():
    case = Case(AdapterSpec(**SIZES[0]), LAYERS["equal"])
    of = (case.spec, case.layer, case.inputs("float32").params)
    for p, update in tolerance.delta(*of, FORMATS["float32"]).items():
        assert np.median(update.error / np.abs(reference.delta(*of)[p])) < 1e-4, p


@pytest.mark.parametrize("name", ["float16", "float32"])
def test_operations_are_bounded(name):
    fmt, dtype = FORMATS[name], np.dtype(name)
    x, y = (RNG.normal(size=(50, 7, 7)).astype(dtype) for _ in range(2))
    one, other = Rounded.exact(x, fmt), Rounded.exact(y, fmt)
    for got, bounded in [
        (x + y, one + other),
        (x - y, one - other),
        (x * y, one * other),
        (x / y, one / other),
        (np.sqrt(np.abs(x)), one.each(np.abs).sqrt(0.0)),
        (x.sum(1, dtype=dtype), one.sum(1)),
        (x.mean(1, dtype=dtype), one.mean(1)),
        (x @ y, one @ other),
        ((x @ y) * y - x, (one @ other) * other - one),
        (x * dtype.type(0.1), one.scale(0.1)),
        (x + y + x, total([one, other, one])),
    ]:
        error = np.abs(got.astype(np.float64) - bounded.value)
        assert (error <= bounded.error).all()
        assert error.max() > 0.01 * bounded.error.max()


def test_rearrangements_are_exact():
    fmt = FORMATS["float32"]
    one = Rounded.exact(RNG.normal(size=(3, 4)), fmt)
    assert not one.each(np.transpose).error.any()
    assert not one.scale(1.0).error.any()
    assert not one.each(lambda x: x[:, None]).mean(1).error.any()
    assert join([one, one], 1).shape == (3, 8)


def test_either_order_takes_the_larger_error():
    fmt = FORMATS["float32"]
    exact = Rounded.exact(np.ones(3), fmt)
    assert (either(exact, Rounded.cast(np.ones(3), fmt)).error > 0).all()


def test_zero_times_anything_does_not_underflow():
    fmt = FORMATS["float32"]
    zero, one = Rounded.exact(np.zeros((2, 2)), fmt), Rounded.exact(np.ones((2, 2)), fmt)
    assert not (zero * one).error.any()
    assert not (zero @ one).error.any()
    tiny = Rounded.exact(np.full((2, 2), 1e-30), fmt)
    assert ((tiny * tiny).error >= fmt.underflow).all()
