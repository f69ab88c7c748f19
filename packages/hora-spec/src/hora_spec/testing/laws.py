"""Laws: what holds whatever the numbers are, so that a backend is judged by itself and not by the reference.

Each takes a `Backend`, a `Case` and a dtype like a check, and returns the worst error over bound.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hora_spec.layout import Layout
from hora_spec.reference import Factors
from hora_spec.shapes import is_trained
from hora_spec.testing import tolerance
from hora_spec.testing.backend import REFERENCE, Backend
from hora_spec.testing.case import Case
from hora_spec.testing.claim import Claim
from hora_spec.testing.rounding import FORMATS

Array = NDArray[Any]


def law_start(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """At the start the delta is exactly zero, and merging it changes no bit of the weight (spec I4)."""
    claim = Claim("law_start", backend, case, dtype, "I4", "delta(spec, layer, init_params(...))")
    inputs = case.inputs(dtype)
    params = {
        key: value.astype(inputs.params[key].dtype)
        for key, value in backend.init_params(case.spec, case.layer, case.seed, "start").items()
    }
    for p, update in backend.delta(case.spec, case.layer, params).items():
        claim.close(f"delta[{p!r}]", update, np.zeros(case.layer[p].weight_shape), np.zeros(case.layer[p].weight_shape))
        claim.equal(f"merged {p!r}", backend.merge(inputs.weight[p], update, Layout()), inputs.weight[p])
    return 0.0


def law_permutation(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """Moving the heads of a layer on by one group moves the row blocks of its delta on by one head (spec G2, D2)."""
    claim = Claim("law_permutation", backend, case, dtype, "G2, D2", "delta(spec, layer, params with heads rolled)")
    params, worst = case.inputs(dtype).params, 0.0
    update = backend.delta(case.spec, case.layer, params)
    for p, shape in case.layer.items():
        per_head = {f"b.{p}": 1, "head_embed": case.layer.group_size(p)}
        if not case.spec.shares_a:
            per_head[f"a.{p}"] = 1
        rolled = {key: np.roll(value, per_head.get(key, 0), axis=0) for key, value in params.items()}
        got = backend.delta(case.spec, case.layer, rolled)[p]
        bound = 2 * tolerance.delta(case.spec, case.layer, rolled, claim.wide)[p].error
        worst = max(worst, claim.close(f"delta[{p!r}]", got, np.roll(update[p], shape.head_dim, axis=0), bound))
    return worst


def law_scale_and_shift(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """Twice a head embedding plus a constant is the same head embedding, once it is normalised (spec G1).

    Embeddings are scaled by 2^20, which puts eps below the roundoff of float64, and hold few enough bits that scaling
    and shifting them is exact in float32.
    """
    if not (case.spec.generates_b and case.spec.normalize):
        return 0.0
    claim = Claim("law_scale_and_shift", backend, case, dtype, "G1", "delta(spec, layer, params), head_embed * 2 + c")
    params, worst = case.inputs(dtype).params, 0.0
    embed = np.round(params["head_embed"] * 256) * 2**12
    one, other = params | {"head_embed": embed}, params | {"head_embed": 2 * embed + 3 * 2**20}
    results = [backend.delta(case.spec, case.layer, given) for given in (one, other)]
    bounds = [tolerance.delta(case.spec, case.layer, given, claim.wide) for given in (one, other)]
    for p in case.layer:
        bound = bounds[0][p].error + bounds[1][p].error
        worst = max(worst, claim.close(f"delta[{p!r}]", results[1][p], np.asarray(results[0][p], np.float64), bound))
    return worst


def law_merged_forward(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """A merged weight maps tokens as the adapted projection does (spec D3, M1)."""
    claim = Claim("law_merged_forward", backend, case, dtype, "D3, M1", "hora_linear(x, merge(weight, delta), ...)")
    inputs, worst = case.inputs(dtype), 0.0
    of = (case.spec, case.layer, inputs.params)
    updates, factors, bounds = backend.delta(*of), backend.factors(*of), tolerance.delta(*of, claim.wide)
    for p, update in updates.items():
        x, weight, bias = inputs.x[p], inputs.weight[p], inputs.bias[p]
        adapted = backend.hora_linear(x, weight, bias, factors[p], case.spec.scaling)
        merged = backend.merge(weight, update, Layout())
        none = Factors(*(np.zeros_like(part) for part in factors[p]))
        got = backend.hora_linear(x, merged, bias, none, 1.0)
        off = 2 * (bounds[p].error + claim.format.unit * np.abs(np.float64(merged)))  # of both effective weights
        bound = (
            tolerance.linear(x, weight, bias, factors[p], case.spec.scaling, fmt=claim.format).error
            + tolerance.linear(x, merged, bias, none, 1.0, fmt=claim.format).error
            + np.abs(np.float64(x)) @ off.T
        )
        worst = max(worst, claim.close(f"y[{p!r}]", got, np.asarray(adapted, np.float64), bound))
    return worst


def law_finite_differences(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """Gradients are the slopes of the reference's ``sum_p <cotangent_p, delta_p>``, along a line per parameter (G7).

    The forward and the backward difference of one step enclose every slope between them, at a kink too, so their
    distance bounds the truncation of the central one. Regimes that sit on a kink are left out.
    """
    if case.regime not in ("normal", "offset"):
        return 0.0
    claim = Claim("law_finite_differences", backend, case, dtype, "G7", "grads(spec, layer, params, delta_cotangent)")
    inputs, worst, step, exact = case.inputs(dtype), 0.0, 1e-5, FORMATS["float64"]
    params = {key: value.astype(np.float64) for key, value in inputs.params.items()}
    weights = {p: inputs.delta_cotangent[p].astype(np.float64) for p in case.layer}
    got = backend.grads(case.spec, case.layer, inputs.params, inputs.delta_cotangent)
    bounds = tolerance.grads(case.spec, case.layer, inputs.params, inputs.delta_cotangent, claim.wide)
    updates = tolerance.delta(case.spec, case.layer, params, exact)
    noise = sum(
        (np.abs(weights[p]) * (u.error + exact.gamma(u.value.size) * u.magnitude)).sum() for p, u in updates.items()
    )

    def loss(given: dict[str, Array]) -> float:
        return sum((weights[p] * u).sum() for p, u in REFERENCE.delta(case.spec, case.layer, given).items())

    for key, value in params.items():
        if not is_trained(case.spec, key):
            continue
        line = case.draw(f"line.{key}", value.shape).astype(np.float64)
        below, here, above = (loss(params | {key: value + at * line}) for at in (-step, 0.0, step))
        moved = exact.unit * np.abs(got[key] * value).sum()  # the rounding of value + step * line
        truncation = abs(above - 2 * here + below) / step
        bound = (bounds[key].error * np.abs(line)).sum() + truncation + (noise + moved) / step
        slope, expected = (np.asarray(number) for number in ((got[key] * line).sum(), (above - below) / (2 * step)))
        worst = max(worst, claim.close(f"slope along {key}", slope, expected, np.asarray(bound)))
    return worst
