"""Checks: does a backend compute what the specification says?

Each takes a `Backend` and a `Case`, compares full arrays with `hora_spec.reference` under
`hora_spec.testing.tolerance`, and returns the worst error as a fraction of its bound, so that a report can say how much
of it is used. A failure is an AssertionError that shows the value, the rule, the call and the line that replays it.
"""

from typing import Any

from numpy.typing import NDArray

from hora_spec.testing import tolerance
from hora_spec.testing.backend import REFERENCE, Backend
from hora_spec.testing.case import Case
from hora_spec.testing.claim import Claim
from hora_spec.testing.rounding import FORMATS

Array = NDArray[Any]

FLOAT64 = FORMATS["float64"]


def check_init(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """Initial parameters are the specification's, float32, bit for bit (spec I1 to I5)."""
    worst = 0.0
    for name in ("model.layers.0.self_attn", "blocks.11.attn"):
        claim = Claim(
            "check_init", backend, case, dtype, "I1 to I5", f"init_params(spec, layer, {case.seed}, {name!r})"
        )
        got = backend.init_params(case.spec, case.layer, case.seed, name)
        expected = REFERENCE.init_params(case.spec, case.layer, case.seed, name)
        claim.keys("init_params(...)", got, expected)
        worst = max(worst, *(claim.equal(key, got[key], value) for key, value in expected.items()))
    return worst


def check_factors(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """Factors of every projection (spec G1 to G6)."""
    claim = Claim("check_factors", backend, case, dtype, "G1 to G6", "factors(spec, layer, params)")
    of = (case.spec, case.layer, case.inputs(dtype).params)
    got, expected = backend.factors(*of), REFERENCE.factors(*of)
    own, own64 = tolerance.factors(*of, claim.wide), tolerance.factors(*of, FLOAT64)
    claim.keys("factors(...)", got, expected)
    return max(
        claim.close(f"factors[{p!r}].{side}", got[p][i], expected[p][i], own[p][i].error + own64[p][i].error)
        for p in case.layer
        for i, side in enumerate("ab")
    )


def check_delta(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """Dense update of every projection (spec D1, D2)."""
    claim = Claim("check_delta", backend, case, dtype, "D1, D2", "delta(spec, layer, params)")
    of = (case.spec, case.layer, case.inputs(dtype).params)
    got, expected = backend.delta(*of), REFERENCE.delta(*of)
    own, own64 = tolerance.delta(*of, claim.wide), tolerance.delta(*of, FLOAT64)
    claim.keys("delta(...)", got, expected)
    return max(claim.close(f"delta[{p!r}]", got[p], expected[p], own[p].error + own64[p].error) for p in case.layer)


def check_linear(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """Adapted projection of a batch of tokens, in any dtype (spec D3)."""
    claim = Claim("check_linear", backend, case, dtype, "D3", "hora_linear(x, weight, bias, factors, scaling)")
    inputs, worst = case.inputs(dtype), 0.0
    for p in case.layer:
        of = (inputs.x[p], inputs.weight[p], inputs.bias[p], inputs.factors[p], case.spec.scaling)
        own, own64 = (tolerance.linear(*of, fmt=fmt) for fmt in (claim.format, FLOAT64))
        bound = own.error + own64.error
        worst = max(worst, claim.close(f"y[{p!r}]", backend.hora_linear(*of), REFERENCE.hora_linear(*of), bound))
    return worst


def check_linear_grads(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """Backward pass of the adapted projection (spec D3, G7)."""
    call = "linear_grads(x, weight, bias, factors, scaling, cotangent)"
    claim = Claim("check_linear_grads", backend, case, dtype, "D3, G7", call)
    inputs, worst = case.inputs(dtype), 0.0
    for p in case.layer:
        x, weight, scaling, cotangent = inputs.x[p], inputs.weight[p], case.spec.scaling, inputs.cotangent[p]
        of = (x, weight, inputs.bias[p], inputs.factors[p], scaling, cotangent)
        own, own64 = (
            tolerance.linear_grads(x, weight, inputs.factors[p], scaling, cotangent, fmt=fmt)
            for fmt in (claim.format, FLOAT64)
        )
        results = zip("xab", backend.linear_grads(*of), REFERENCE.linear_grads(*of), own, own64, strict=True)
        for name, got, expected, error, error64 in results:
            ratio = claim.close(f"gradient of {name} of {p!r}", got, expected, error.error + error64.error)
            worst = max(worst, ratio)
    return worst


def check_grads(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """Gradients of every parameter (spec G7)."""
    claim = Claim("check_grads", backend, case, dtype, "G7", "grads(spec, layer, params, delta_cotangent)")
    inputs = case.inputs(dtype)
    of = (case.spec, case.layer, inputs.params, inputs.delta_cotangent)
    got, expected = backend.grads(*of), REFERENCE.grads(*of)
    own, own64 = tolerance.grads(*of, claim.wide), tolerance.grads(*of, FLOAT64)
    claim.keys("grads(...)", got, expected)
    return max(
        claim.close(f"gradient of {key}", got[key], expected[key], own[key].error + own64[key].error)
        for key in expected
    )
