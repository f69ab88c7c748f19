"""Checks: does a backend compute what the specification says?

Each takes a `Backend` and a `Case`, compares full arrays with `hora_spec.reference` under
`hora_spec.testing.tolerance`, and returns the worst error as a fraction of its bound, so that a report can say how much
of it is used. A failure is an AssertionError that shows the value, the rule, the call and the line that replays it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hora_spec.errors import HoraError
from hora_spec.goldens import Golden
from hora_spec.layout import Layout
from hora_spec.reference import Factors
from hora_spec.shapes import LayerShape
from hora_spec.spec import AdapterSpec
from hora_spec.testing import tolerance
from hora_spec.testing.backend import REFERENCE, Backend
from hora_spec.testing.case import Case, numpy_dtype
from hora_spec.testing.claim import Claim
from hora_spec.testing.rounding import FORMATS

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Generated = tuple[AdapterSpec, LayerShape, Arrays]

FLOAT64 = FORMATS["float64"]
"""Format of the expected values, whose own rounding adds to every bound."""


def check_init(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """Initial parameters are the specification's, float32, bit for bit (spec I1 to I6)."""
    worst = 0.0
    for name in ("model.layers.0.self_attn", "blocks.11.attn"):
        call = f"init_params(spec, layer, {case.seed}, {name!r})"
        claim = Claim("check_init", backend, case, dtype, "I1 to I6", call)
        got = backend.init_params(case.spec, case.layer, case.seed, name)
        expected = REFERENCE.init_params(case.spec, case.layer, case.seed, name)
        claim.keys("init_params(...)", got, expected)
        worst = max(worst, *(claim.equal(key, got[key], value) for key, value in expected.items()))
    return worst


def check_factors(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """Factors of every projection (spec G1 to G6)."""
    claim = Claim("check_factors", backend, case, dtype)
    of = (case.spec, case.layer, case.inputs(dtype).params)
    return _compare_factors(claim, of, REFERENCE.factors(*of))


def check_delta(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """Dense update of every projection (spec D1, D2)."""
    claim = Claim("check_delta", backend, case, dtype)
    of = (case.spec, case.layer, case.inputs(dtype).params)
    return _compare_delta(claim, of, REFERENCE.delta(*of))


def check_linear(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """Adapted projection of a batch of tokens, in any dtype (spec D3)."""
    claim, inputs, worst = Claim("check_linear", backend, case, dtype), case.inputs(dtype), 0.0
    for p, factors in inputs.factors.items():
        of = (inputs.x[p], inputs.weight[p], inputs.bias[p], factors, case.spec.scaling)
        worst = max(worst, _compare_linear(claim, p, of, REFERENCE.hora_linear(*of), factors))
    return worst


def check_linear_grads(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """Backward pass of the adapted projection (spec D3, G7)."""
    call = "linear_grads(x, weight, bias, factors, scaling, cotangent)"
    claim = Claim("check_linear_grads", backend, case, dtype, "D3, G7", call)
    inputs, scaling, worst = case.inputs(dtype), case.spec.scaling, 0.0
    for p, factors in inputs.factors.items():
        x, weight, cotangent = inputs.x[p], inputs.weight[p], inputs.cotangent[p]
        of = (x, weight, inputs.bias[p], factors, scaling, cotangent)
        own, own64 = (
            tolerance.linear_grads(x, weight, factors, scaling, cotangent, fmt=fmt) for fmt in (claim.format, FLOAT64)
        )
        results = zip("xab", backend.linear_grads(*of), REFERENCE.linear_grads(*of), own, own64, strict=True)
        for name, got, expected, error, error64 in results:
            ratio = claim.close(f"gradient of {name} of {p!r}", got, expected, error.error + error64.error)
            worst = max(worst, ratio)
    return worst


def check_grads(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """Gradients of every parameter (spec G7)."""
    claim, inputs = Claim("check_grads", backend, case, dtype), case.inputs(dtype)
    of = (case.spec, case.layer, inputs.params)
    return _compare_grads(claim, of, inputs.delta_cotangent, REFERENCE.grads(*of, inputs.delta_cotangent))


def check_golden(backend: Backend, golden: Golden, dtype: str = "float32") -> float:
    """Factors, delta, adapted projection, merged weight and gradients of a stored case (spec G4, G7, D2, D3, M1).

    The reference is not run. The stored inputs are float32 numbers, so `dtype` is ``"float32"`` or ``"float64"``.
    """
    if dtype not in ("float32", "float64"):
        raise HoraError(f'goldens are compared in "float32" or "float64", got {dtype!r}: use a Case')
    claim = Claim("check_golden", backend, golden, dtype)
    cast = numpy_dtype(dtype)
    of = (golden.spec, golden.layer, {key: value.astype(cast) for key, value in golden.params.items()})
    cotangents = {p: value.astype(cast) for p, value in golden.cotangent.items()}
    worst = [
        _compare_factors(claim, of, golden.factors),
        _compare_delta(claim, of, golden.delta),
        _compare_grads(claim, of, cotangents, golden.grads),
    ]
    for p, (a, b) in golden.factors.items():
        bias = golden.bias[p]
        x, weight = golden.x[p].astype(cast), golden.weight[p].astype(cast)
        given = (x, weight, None if bias is None else bias.astype(cast), Factors(a.astype(cast), b.astype(cast)))
        worst.append(
            _compare_linear(claim, p, (*given, golden.spec.scaling), golden.y[p], golden.factors[p]),
        )
        merged = backend.merge(golden.weight[p], golden.delta[p].astype(cast), Layout())
        expected = golden.merged[p].astype(np.float64)
        # the delta may be rounded to float32 too, which may move the sum across a rounding boundary
        error = FORMATS["float32"].unit * (np.abs(golden.delta[p]) + 2 * np.abs(expected))
        asked = claim.about("M1", "merge(weight, delta, Layout())")
        worst.append(asked.close(f"merged[{p!r}]", merged, expected, error))
    return max(worst)


def _compare_factors(claim: Claim, of: Generated, expected: Mapping[str, Factors]) -> float:
    claim = claim.about("G1 to G6", "factors(spec, layer, params)")
    got = claim.backend.factors(*of)
    own, own64 = tolerance.factors(*of, claim.wide), tolerance.factors(*of, FLOAT64)
    claim.keys("factors(...)", got, expected)
    return max(
        claim.close(f"factors[{p!r}].{side}", got[p][i], expected[p][i], own[p][i].error + own64[p][i].error)
        for p in expected
        for i, side in enumerate("ab")
    )


def _compare_delta(claim: Claim, of: Generated, expected: Arrays) -> float:
    claim = claim.about("D1, D2", "delta(spec, layer, params)")
    got = claim.backend.delta(*of)
    own, own64 = tolerance.delta(*of, claim.wide), tolerance.delta(*of, FLOAT64)
    claim.keys("delta(...)", got, expected)
    return max(claim.close(f"delta[{p!r}]", got[p], expected[p], own[p].error + own64[p].error) for p in expected)


def _compare_linear(
    claim: Claim,
    p: str,
    of: tuple[Array, Array, Array | None, Factors, float],
    expected: Array,
    factors: Factors,
) -> float:
    """`factors` are those that `expected` was computed with; the backend's may have been rounded once."""
    claim = claim.about("D3", "hora_linear(x, weight, bias, factors, scaling)")
    x, weight, bias, _, scaling = of
    own, own64 = (tolerance.linear(x, weight, bias, factors, scaling, fmt=fmt) for fmt in (claim.format, FLOAT64))
    return claim.close(f"y[{p!r}]", claim.backend.hora_linear(*of), expected, own.error + own64.error)


def _compare_grads(claim: Claim, of: Generated, cotangents: Arrays, expected: Arrays) -> float:
    claim = claim.about("G7", "grads(spec, layer, params, cotangents)")
    got = claim.backend.grads(*of, cotangents)
    own, own64 = (tolerance.grads(*of, cotangents, fmt) for fmt in (claim.wide, FLOAT64))
    claim.keys("grads(...)", got, expected)
    return max(
        claim.close(f"gradient of {key}", got[key], expected[key], own[key].error + own64[key].error)
        for key in expected
    )
