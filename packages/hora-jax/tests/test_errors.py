"""Wrong input: a public function that is given junk answers, or raises a HoraError that says rule, got and fix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hora_jax
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hora_jax import Target
from hora_jax.nnx import HoraModel
from hora_spec import AdapterSpec, HoraError, preset

JUNK = [None, 0, -1, 1.5, True, "", "junk", (), [1], {}, {"a": 1}, object(), b"x", float("nan"), jnp.ones(3), len]

SPEC, JOINT = AdapterSpec(2, hidden_dim=3, head_embed_dim=4), preset("joint", 2)
PARAMS = {"a": {p: jax.random.normal(jax.random.key(i), (16, 4, 4)) / 4 for i, p in enumerate("qv")}}
TARGETS = [Target(f"a.{p}", p, "d h k", layer="a", module=p) for p in "qv"]
PLAN, FIXED = (hora_jax.make_plan(PARAMS, spec, TARGETS) for spec in (SPEC, JOINT))
PHI, PHI_FIXED = hora_jax.init(PLAN), hora_jax.init(FIXED)
X = jax.random.normal(jax.random.key(5), (12, 16))


def fn(p, x):
    return sum(jnp.einsum("bd,dhk->bhk", x, p["a"][name]) for name in "qv")


def loss(p, x):
    return jnp.square(fn(p, x) - 1).mean()


class Base(nnx.Module):
    def __init__(self):
        self.q = nnx.LinearGeneral(16, (4, 4), rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.q(x)


MODEL = Base()
OF_MODEL = hora_jax.make_plan(MODEL, SPEC, Target("q.kernel", "q", "d h k", layer="a"))


def adapted(params, phi, dropout_key):
    return hora_jax.adapt(fn, PLAN, dropout=0.1)(params, phi, X, dropout_key=dropout_key)


def each(params, phis):
    return hora_jax.adapt_each(fn, PLAN)(params, phis, X[None])


def verify(plan, fn, params, phi, route):
    return hora_jax.verify(plan, fn, params, phi, X, route=route)


@dataclass
class Call:
    """A call that works; each of its arguments is then replaced."""

    fn: Callable[..., Any]
    valid: dict[str, Any]
    writes: str = ""


OWN_AFFAIR = {"fn": type(len), "loss": type(len), "batches": str | list | tuple | dict | bytes | jax.Array}
"""Junk of these types is what it should be, a function or some batches, and fails by itself."""

CALLS = [
    Call(
        Target,
        {
            "path": "a.q",
            "projection": "q",
            "layout": "d h k",
            "heads": None,
            "fused": None,
            "layer": "a",
            "module": "q",
        },
    ),
    Call(hora_jax.make_plan, {"params": PARAMS, "spec": SPEC, "targets": TARGETS}),
    Call(hora_jax.init, {"plan": PLAN, "seed": 0, "dtype": jnp.float32}),
    Call(hora_jax.factors, {"plan": PLAN, "phi": PHI}),
    Call(hora_jax.delta, {"plan": PLAN, "phi": PHI}),
    Call(hora_jax.merge, {"plan": PLAN, "params": PARAMS, "phi": PHI}),
    Call(hora_jax.weights, {"plan": PLAN, "params": PARAMS}),
    Call(hora_jax.replace_weights, {"params": PARAMS, "new": hora_jax.weights(PLAN, PARAMS)}),
    Call(hora_jax.labels, {"plan": PLAN, "phi": PHI}),
    Call(hora_jax.split, {"plan": FIXED, "phi": PHI_FIXED}),
    Call(hora_jax.join, dict(zip(("trained", "fixed"), hora_jax.split(FIXED, PHI_FIXED), strict=True))),
    Call(hora_jax.adapt, {"fn": fn, "plan": PLAN, "route": "auto", "dense": "allow", "dropout": 0.0}),
    Call(adapted, {"params": PARAMS, "phi": PHI, "dropout_key": jax.random.key(0)}),
    Call(hora_jax.adapt_each, {"fn": fn, "plan": PLAN, "dense": "allow"}),
    Call(each, {"params": PARAMS, "phis": jax.tree.map(lambda v: v[None], PHI)}),
    Call(verify, {"plan": PLAN, "fn": fn, "params": PARAMS, "phi": PHI, "route": "auto"}),
    Call(hora_jax.to_adapter, {"plan": PLAN, "phi": PHI, "config": None, "modules": None}),
    Call(hora_jax.from_adapter, {"plan": PLAN, "adapter": hora_jax.to_adapter(PLAN, PHI)}),
    Call(
        hora_jax.save_adapter,
        {"plan": PLAN, "phi": PHI, "config": None, "modules": None, "directory": None},
        writes="directory",
    ),
    Call(
        hora_jax.export_lora,
        {"plan": PLAN, "phi": PHI, "directory": None, "dtype": "float32", "for_server": None},
        writes="directory",
    ),
    Call(
        hora_jax.joint_a,
        {
            "plan": FIXED,
            "loss": loss,
            "params": PARAMS,
            "phi": PHI_FIXED,
            "batches": [X],
            "of": "gradient",
            "scale": "kaiming",
            "power": 1,
            "oversample": 2,
            "seed": 0,
        },
    ),
    Call(
        HoraModel,
        {
            "base": MODEL,
            "plan": OF_MODEL,
            "phi": hora_jax.init(OF_MODEL),
            "route": "auto",
            "dense": "allow",
            "dropout": 0.0,
        },
    ),
]


def name_of(call: Call) -> str:
    return call.fn.__name__


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_junk_for_any_argument_is_a_hora_error_or_an_answer(call, tmp_path):
    wrong = []
    for name in call.valid:
        for i, junk in enumerate(JUNK):
            if isinstance(junk, OWN_AFFAIR.get(name, ())):
                continue
            written = {call.writes: tmp_path / f"{name}-{i}"} if call.writes else {}
            try:
                call.fn(**{**call.valid, name: junk, **written})
            except HoraError as error:
                if "got" not in str(error) or not any(fix in str(error) for fix in (": ", " must be ")):
                    wrong.append(f"{name}={junk!r} says too little: {error}")
            except Exception as error:
                wrong.append(f"{name}={junk!r}: {type(error).__name__}: {str(error)[:90]!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_the_calls_that_get_junk_work_with_what_they_should_get(call, tmp_path):
    call.fn(**{**call.valid, **({call.writes: tmp_path / "valid"} if call.writes else {})})


def test_a_call_is_named_once():
    assert len(set(map(name_of, CALLS))) == len(CALLS)
