"""Making goldens, and proving that the stored ones still hold."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from hora_spec import reference
from hora_spec.errors import HoraError
from hora_spec.goldens import Golden
from hora_spec.layout import Layout
from hora_spec.testing.backend import REFERENCE
from hora_spec.testing.case import LAYERS, Case, first_corpus, second_corpus
from hora_spec.testing.checks import check_golden

Array = NDArray[Any]

INPUTS = ("params", "x", "weight", "bias", "cotangent")


def build(name: str, case: Case) -> Golden:
    """What the reference makes of a case."""
    spec, layer, inputs = case.spec, case.layer, case.inputs("float32")
    factors, delta = reference.factors(spec, layer, inputs.params), reference.delta(spec, layer, inputs.params)
    return Golden(
        name=name,
        spec=spec,
        layer=layer,
        seed=case.seed,
        regime=case.regime,
        params=inputs.params,
        x=inputs.x,
        weight=inputs.weight,
        bias=inputs.bias,
        cotangent=inputs.delta_cotangent,
        factors=factors,
        delta=delta,
        y={
            p: reference.hora_linear(inputs.x[p], inputs.weight[p], inputs.bias[p], factors[p], spec.scaling)
            for p in layer
        },
        merged={p: reference.merge(inputs.weight[p], delta[p], Layout()) for p in layer},
        grads=reference.grads(spec, layer, inputs.params, inputs.delta_cotangent),
    )


def rebuilt(golden: Golden) -> Golden:
    """The golden as the reference would make it today."""
    return build(golden.name, Case(golden.spec, golden.layer, golden.seed, golden.regime))


def first_version() -> dict[str, Golden]:
    """The cases of version 1, named by method and layer."""
    return _named(first_corpus())


def second_version() -> dict[str, Golden]:
    """What version 2 adds: a fixed A, one A for all projections, gates."""
    return _named(second_corpus())


def _named(cases: Iterable[Case]) -> dict[str, Golden]:
    layers = {layer: name for name, layer in LAYERS.items()}
    goldens = {}
    for case in cases:
        spec = case.spec
        words = [spec.sharing, spec.a_source, spec.activation, str(spec.gain)]
        words += ["tied"] * spec.tie_a + [f"gate_{spec.gate}"] * (spec.gate is not None)
        name = "-".join((*words, layers[case.layer]))
        goldens[name] = build(name, case)
    return goldens


def serialized(golden: Golden) -> bytes:
    """Content of the golden's file; equal goldens have equal bytes."""
    about = {
        "spec": golden.spec.to_dict(),
        "layer": {p: [shape.num_heads, shape.head_dim, shape.embed_dim] for p, shape in golden.layer.items()},
        "seed": golden.seed,
        "regime": golden.regime,
    }
    return save(tensors(golden), metadata={"golden": json.dumps(about)})


def tensors(golden: Golden) -> dict[str, Array]:
    """All arrays of a golden under the names they have in its file."""
    kinds = {kind: getattr(golden, kind) for kind in (*INPUTS, "delta", "y", "merged", "grads")}
    kinds["factor_a"] = {p: factors.a for p, factors in golden.factors.items()}
    kinds["factor_b"] = {p: factors.b for p, factors in golden.factors.items()}
    return {
        f"{kind}.{name}": np.ascontiguousarray(value)
        for kind, arrays in kinds.items()
        for name, value in arrays.items()
        if value is not None
    }


def verify(golden: Golden) -> tuple[bool, float]:
    """Whether the golden is reproduced to the bit, and else its worst error as a fraction of what is allowed.

    Inputs come from IEEE arithmetic alone and must be equal everywhere. Outputs may differ by what another mathematics
    library or order of summation does to float64, which is what `hora_spec.testing.tolerance` bounds.

    Raises
    ------
    HoraError
        If an input differs.
    AssertionError
        If an output differs by more.
    """
    again = rebuilt(golden)
    stored, made = tensors(golden), tensors(again)
    for key, value in stored.items():
        if key.partition(".")[0] in INPUTS and value.tobytes() != made[key].tobytes():
            raise HoraError(f"inputs of a golden never change, got another {key} for {golden.name!r}: revert (spec I1)")
    return serialized(golden) == serialized(again), check_golden(REFERENCE, golden, "float64")


def write(folder: Path, goldens: dict[str, Golden]) -> None:
    """Store goldens in a new folder; stored ones are never edited."""
    if folder.exists():
        raise HoraError(f"goldens are written to a new folder, got {folder}, which exists: add a version instead")
    folder.mkdir(parents=True)
    for name, golden in goldens.items():
        (folder / f"{name}.safetensors").write_bytes(serialized(golden))
