"""What is compared on every case, and which rules of the specification a case exercises."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from hora_spec import Layout
from hora_spec.testing import (
    Backend,
    Case,
    check_delta,
    check_factors,
    check_grads,
    check_init,
    check_linear,
    check_linear_grads,
    check_merge,
    check_merge_refuses,
    law_finite_differences,
    law_merged_forward,
    law_permutation,
    law_scale_and_shift,
    law_start,
    tolerance,
)
from hora_spec.testing.claim import Claim

from .report import Tally

Rules = Callable[[Case], set[str]]


def generation_rules(case: Case) -> set[str]:
    """Rules of generation that decide a case's factors."""
    spec, layer = case.spec, case.layer
    groups = {layer.group_size(p) for p in layer}
    return {
        rule
        for rule, holds in {
            "S6": True,
            "G1": spec.generates_b and spec.normalize,
            "G2": spec.generates_b and max(groups) > 1,
            "G3": spec.generates_a or spec.generates_b,
            "G4": True,
            "G5": (spec.generates_a or spec.generates_b) and spec.gain == "transfer",
            "G6": spec.residual,
            "G8": spec.gate is not None,
        }.items()
        if holds
    }


def _delta_rules(case: Case) -> set[str]:
    return {"D2"} | ({"D1"} if case.spec.alpha is not None else set())


def _init_rules(case: Case) -> set[str]:
    return {"I1", "I2", "I4", "I5", "S6"} | ({"I3"} if case.spec.generates_b else set())


class Check(NamedTuple):
    """A check of the conformance kit: its family in the report, and the rules that a case puts to the test, if any."""

    family: str
    run: Callable[[Backend, Case, str], float]
    rules: Rules


INIT = Check("init", check_init, _init_rules)
FACTORS = Check("factors", check_factors, generation_rules)
DELTA = Check("delta", check_delta, _delta_rules)
GRADS = Check("gradients", check_grads, lambda case: {"G7"} | generation_rules(case))
LINEAR = Check("linear", check_linear, lambda case: {"D3"})
LINEAR_GRADS = Check("linear gradients", check_linear_grads, lambda case: {"D3", "G7"})
MERGE = Check("merge", check_merge, lambda case: {"M1", "L1", "L2", "L4"})
REFUSES = Check("borders", check_merge_refuses, lambda case: {"M3", "E1"})

GENERATION = (FACTORS, DELTA, GRADS)
ROUTES = (LINEAR, LINEAR_GRADS)
LAWS = (
    Check("laws", law_start, lambda case: {"I4"}),
    Check("laws", law_permutation, lambda case: {"D2"} | ({"G2"} & generation_rules(case))),
    Check("laws", law_scale_and_shift, lambda case: {"G1"} & generation_rules(case)),
    Check("laws", law_merged_forward, lambda case: {"D3", "M1"}),
    Check("laws", law_finite_differences, lambda case: {"G7"} if case.regime in ("normal", "offset") else set()),
)


def agree(one: Backend, other: Backend, case: Case, dtype: str) -> float:
    """Two backends give the same arrays: error over the sum of their bounds, worst of all that they compute."""
    claim = Claim("agree", one, case, dtype, "G1 to D3", f"the same of {other.name}")
    inputs, spec, layer = case.inputs(dtype), case.spec, case.layer
    of = (spec, layer, inputs.params)
    generated = [backend.factors(*of) for backend in (one, other)]
    updates = [backend.delta(*of) for backend in (one, other)]
    slopes = [backend.grads(*of, inputs.delta_cotangent) for backend in (one, other)]
    pairs = []
    for p, bounds in tolerance.factors(*of, claim.wide).items():
        pairs += [(f"factors[{p!r}].{s}", *(x[p][i] for x in generated), bounds[i]) for i, s in enumerate("ab")]
    pairs += [(f"delta[{p!r}]", *(x[p] for x in updates), b) for p, b in tolerance.delta(*of, claim.wide).items()]
    for key, bound in tolerance.grads(*of, inputs.delta_cotangent, claim.wide).items():
        pairs.append((f"gradient of {key}", *(x[key] for x in slopes), bound))
    for p in layer:
        given = (inputs.x[p], inputs.weight[p], inputs.bias[p], inputs.factors[p], spec.scaling)
        outputs = [backend.hora_linear(*given) for backend in (one, other)]
        pairs.append((f"y[{p!r}]", *outputs, tolerance.linear(*given, fmt=claim.format)))
    return max(claim.close(name, a, np.float64(b), 2 * bound.error) for name, a, b, bound in pairs)


def same_bits(one: Backend, other: Backend, case: Case) -> None:
    """Two backends start from the same bits and merge the same delta to the same bits."""
    claim = Claim("same_bits", one, case, "float32", "I1 to I6, M1", f"the same of {other.name}")
    starts = [
        backend.init_params(case.spec, case.layer, case.seed, "model.layers.7.self_attn") for backend in (one, other)
    ]
    for key, value in starts[0].items():
        claim.equal(key, value, starts[1][key])
    inputs = case.inputs("float32")
    for p, update in inputs.delta_cotangent.items():
        merged = [backend.merge(inputs.weight[p], update, Layout()) for backend in (one, other)]
        claim.equal(f"merged {p!r}", *merged)


def run(
    checks: tuple[Check, ...], backend: Backend, case: Case, dtype: str, tally: Tally, *, replay: bool = False
) -> None:
    """Run checks on one case and record their ratios; with `replay` the record names the case."""
    for check in checks:
        if rules := check.rules(case):
            ratio = check.run(backend, case, dtype)
            tally.add(check.family, f"{backend.name} {dtype}", rules, ratio, case if replay else None)
