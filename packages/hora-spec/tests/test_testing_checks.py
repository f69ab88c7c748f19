"""The conformance kit judges honest backends: the reference, and a vectorised one in the dtype of its input."""

import numpy as np
import pytest
from hora_spec.testing import CHECKS, LAWS, REFERENCE, VECTORIZED, Case, check_delta, check_factors, check_merge, corpus
from hora_spec.testing.strategies import cases
from hypothesis import given

EVERY = pytest.mark.parametrize("check", CHECKS + LAWS, ids=lambda check: check.__name__)


@EVERY
@given(case=cases())
def test_the_reference_passes(check, case):
    assert check(REFERENCE, case, "float64") <= 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@EVERY
@given(case=cases())
def test_a_vectorised_backend_passes(check, dtype, case):
    assert check(VECTORIZED, case, dtype) <= 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@EVERY
def test_a_vectorised_backend_passes_in_16_bits(check, dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="NumPy has bfloat16 through ml_dtypes alone")
    for case in corpus():
        assert check(VECTORIZED, case, dtype) <= 1


@pytest.mark.parametrize("check", [check_factors, check_delta], ids=lambda check: check.__name__)
def test_a_backend_without_digits_fails(check):
    half = VECTORIZED._replace(
        factors=lambda spec, layer, params: VECTORIZED.factors(spec, layer, _half(params)),
        delta=lambda spec, layer, params: VECTORIZED.delta(spec, layer, _half(params)),
    )
    with pytest.raises(AssertionError, match="times the bound away"):
        check(half, corpus()[0], "float32")


def test_a_failure_shows_value_rule_call_and_replay():
    case = corpus()[2]
    wrong = REFERENCE._replace(name="wrong", delta=lambda *args: {p: d + 1 for p, d in REFERENCE.delta(*args).items()})
    with pytest.raises(AssertionError) as failure:
        check_delta(wrong, case, "float32")
    message = str(failure.value)
    assert message.startswith("wrong: delta['")
    for part in ("times the bound away (spec D1, D2)", "call:   delta(spec, layer, params)", f"seed={case.seed}"):
        assert part in message


def test_a_replay_line_replays():
    namespace = {
        name: getattr(__import__("hora_spec"), name) for name in ("AdapterSpec", "LayerShape", "ProjectionShape")
    }
    for case in corpus():
        assert eval(repr(case), namespace | {"Case": Case}) == case


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda delta: {p: d[:, :-1] for p, d in delta.items()}, "must have shape"),
        (lambda delta: {p: d * np.nan for p, d in delta.items()}, "got nan"),
        (lambda delta: delta | {"other": delta["q"]}, "must have the keys"),
        (lambda delta: {}, "must have the keys"),
    ],
)
def test_shapes_keys_and_nan_are_seen(wrong, message):
    backend = REFERENCE._replace(delta=lambda *args: wrong(REFERENCE.delta(*args)))
    with pytest.raises(AssertionError, match=message):
        check_delta(backend, corpus()[0], "float32")


def test_a_merged_weight_of_another_dtype_is_seen():
    wide = REFERENCE._replace(merge=lambda *args: REFERENCE.merge(*args).astype(np.float64))
    with pytest.raises(AssertionError, match="must be float32"):
        check_merge(wide, corpus()[0], "float32")


def _half(params):
    return {key: value.astype(np.float16).astype(value.dtype) for key, value in params.items()}
