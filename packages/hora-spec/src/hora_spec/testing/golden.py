"""A backend against stored numbers, without running the reference."""

from dataclasses import replace

import numpy as np

from hora_spec.errors import HoraError
from hora_spec.goldens import Golden
from hora_spec.layout import Layout
from hora_spec.reference import Factors
from hora_spec.testing import tolerance
from hora_spec.testing.backend import Backend
from hora_spec.testing.case import numpy_dtype
from hora_spec.testing.claim import Claim
from hora_spec.testing.rounding import FORMATS


def check_golden(backend: Backend, golden: Golden, dtype: str = "float32") -> float:
    """Factors, delta, adapted projection, merged weight and gradients of a stored case (spec G4, G7, D2, D3, M1).

    Parameters
    ----------
    backend
        What to check.
    golden
        One of `hora_spec.load_goldens`.
    dtype
        ``"float32"`` or ``"float64"``.

    Returns
    -------
    float
        Worst error as a fraction of its bound.
    """
    if dtype not in ("float32", "float64"):
        raise HoraError(f'goldens are compared in "float32" or "float64", got {dtype!r}: their inputs are float32')
    claim = Claim("check_golden", backend, golden, dtype, "", "")
    return max(_generated(claim, golden), _adapted(claim, golden), _gradients(claim, golden))


def _generated(claim: Claim, golden: Golden) -> float:
    of = (golden.spec, golden.layer, _cast(golden.params, claim.dtype))
    bounds, updates = ([f(*of, fmt) for fmt in _formats(claim)] for f in (tolerance.factors, tolerance.delta))
    worst = 0.0
    claim = replace(claim, rule="G1 to G6", call="factors(spec, layer, params)")
    for p, made in claim.backend.factors(*of).items():
        for i, side in enumerate("ab"):
            error = sum(bound[p][i].error for bound in bounds)
            worst = max(worst, claim.close(f"factors[{p!r}].{side}", made[i], golden.factors[p][i], error))
    claim = replace(claim, rule="D1, D2", call="delta(spec, layer, params)")
    for p, made in claim.backend.delta(*of).items():
        error = sum(update[p].error for update in updates)
        worst = max(worst, claim.close(f"delta[{p!r}]", made, golden.delta[p], error))
    return worst


def _adapted(claim: Claim, golden: Golden) -> float:
    dtype, scaling, worst = numpy_dtype(claim.dtype), golden.spec.scaling, 0.0
    for p, factors in golden.factors.items():
        bias = golden.bias[p]
        x, weight = golden.x[p].astype(dtype), golden.weight[p].astype(dtype)
        given = Factors(*(part.astype(dtype) for part in factors))
        made = claim.backend.hora_linear(x, weight, None if bias is None else bias.astype(dtype), given, scaling)
        error = sum(tolerance.linear(x, weight, bias, factors, scaling, fmt=fmt).error for fmt in _formats(claim))
        asked = replace(claim, rule="D3", call="hora_linear(x, weight, bias, factors, scaling)")
        worst = max(worst, asked.close(f"y[{p!r}]", made, golden.y[p], error))

        made = claim.backend.merge(golden.weight[p], golden.delta[p].astype(dtype), Layout())
        expected = golden.merged[p].astype(np.float64)
        # the delta may be rounded to float32 too, which may move the sum across a rounding boundary
        error = FORMATS["float32"].unit * (np.abs(golden.delta[p]) + 2 * np.abs(expected))
        asked = replace(claim, rule="M1", call="merge(weight, delta, Layout())")
        worst = max(worst, asked.close(f"merged[{p!r}]", made, expected, error))
    return worst


def _gradients(claim: Claim, golden: Golden) -> float:
    of = (golden.spec, golden.layer, _cast(golden.params, claim.dtype), _cast(golden.cotangent, claim.dtype))
    claim = replace(claim, rule="G7", call="grads(spec, layer, params, cotangent)")
    made, bounds = claim.backend.grads(*of), [tolerance.grads(*of, fmt) for fmt in _formats(claim)]
    claim.keys("grads(...)", made, golden.grads)
    return max(
        claim.close(f"gradient of {key}", made[key], expected, sum(bound[key].error for bound in bounds))
        for key, expected in golden.grads.items()
    )


def _formats(claim: Claim):
    return claim.format, FORMATS["float64"]


def _cast(arrays: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    return {key: value.astype(numpy_dtype(dtype)) for key, value in arrays.items()}
