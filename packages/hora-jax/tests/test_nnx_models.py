"""Models of every style under `HoraModel`: fused weights, weights that are read, questions that libraries ask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hora_jax import Target, init, make_plan, merge
from hora_jax.nnx import HoraModel
from hora_spec import HoraError, Layout, Window

from .test_nnx import BOTH, close, loss_of, only_adapter


class Served(nnx.Module):
    """A model as libraries use it: more methods than the call, settings, and a question whether it has one."""

    kind = "served"

    def __init__(self) -> None:
        self.proj, self.width, self.parts = nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(0)), 8, nnx.List([])

    def __call__(self, x):
        return self.encode(x) * 2

    def encode(self, x, *, shift=0.0):
        return self.proj(x) + shift

    @staticmethod
    def mask(x):
        return x > 0


def test_what_a_library_asks_of_a_model_is_answered_as_without_adapter(method, perturbed):
    base, x = Served(), jnp.ones((3, 8))
    planned = make_plan(base, method, [Target("proj.kernel", "q", "d (h k)", heads=2, layer="layer")])
    model = HoraModel(base, planned, perturbed(init(planned, seed=0)))
    merged = model.merged()
    assert not jnp.allclose(merged.encode(x), base.encode(x), atol=1e-3)
    close(model.encode(x, shift=1.0), merged.encode(x, shift=1.0))
    close(nnx.jit(lambda model, x: model.encode(x))(model, x), merged.encode(x))
    assert (model.kind, model.width) == ("served", 8)
    assert model.mask(x).all()
    assert hasattr(model, "encode")
    assert not hasattr(model, "decode")


@pytest.mark.parametrize("part", ["proj", "parts"])
def test_parts_of_a_base_that_know_no_adapter_are_not_taken_for_the_models_own(method, perturbed, part):
    base = Served()
    base.parts.append(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    planned = make_plan(base, method, [Target("proj.kernel", "q", "d (h k)", heads=2, layer="layer")])
    model = HoraModel(base, planned, perturbed(init(planned, seed=0)))
    with pytest.raises(AttributeError, match=rf"merged\(\)\.{part}"):
        getattr(model, part)


class Fused(nnx.Module):
    """Query and value in one weight, as linear columns, as heads, and as maps along a leading axis."""

    def __init__(self, form: str) -> None:
        rngs = nnx.Rngs(0)
        self.qkv = {
            "columns": lambda: nnx.Linear(16, 24, rngs=rngs),
            "heads": lambda: nnx.LinearGeneral(16, (6, 4), rngs=rngs),
            "maps": lambda: nnx.Einsum("bsd,chdk->cbshk", (3, 2, 16, 4), rngs=rngs),
        }[form]()

    def __call__(self, x):
        return self.qkv(x)


@BOTH
@pytest.mark.parametrize(
    ("form", "windows"),
    [
        ("columns", [Layout("d (h k)", Window(1, 0, 8)), Layout("d (h k)", Window(1, 16, 24))]),
        ("heads", [Layout("d h k", Window(1, 0, 2)), Layout("d h k", Window(1, 4, 6))]),
        ("maps", [Layout("1 h d k", Window(0, 0, 1)), Layout("1 h d k", Window(0, 2, 3))]),
    ],
)
def test_parts_of_a_fused_weight_are_adapted_alone(form, windows, route, method, perturbed, x):
    base = Fused(form)
    targets = [
        Target("qkv.kernel", p, w, 2 if form == "columns" else None, layer="a")
        for p, w in zip("qv", windows, strict=True)
    ]
    planned = make_plan(base, method, targets)
    model = HoraModel(base, planned, perturbed(init(planned)), route=route)
    changed = model(x) - base(x)
    close(model(x), model.merged()(x))
    parts = jnp.split(changed, 3, {"columns": -1, "heads": -2, "maps": 0}[form])
    assert [bool(part.any()) for part in parts] == [True, False, True]


@BOTH
def test_a_projection_may_read_a_part_of_the_inputs(route, method, perturbed, x):
    class Part(nnx.Module):
        def __init__(self):
            self.proj = nnx.Linear(16, 8, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.proj(x)

    planned = make_plan(Part(), method, Target("proj.kernel", "q", Layout("d (h k)", Window(0, 4, 12)), 2, layer="a"))
    model = HoraModel(Part(), planned, perturbed(init(planned)), route=route)
    close(model(x), model.merged()(x))
    assert not jnp.allclose(model(x), model.base(x))


class OwnsWeights(nnx.Module):
    """Softmax attention that multiplies by weights of its own, whose output has the shape of its query."""

    def __init__(self):
        self.wq, self.wv = (nnx.Param(jax.random.normal(jax.random.key(i), (16, 4, 4)) / 4) for i in range(2))

    def __call__(self, x):
        q, v = (jnp.einsum("...sd,dhk->...hsk", x, w[...]) for w in (self.wq, self.wv))
        y = jax.nn.softmax(q @ jnp.swapaxes(q, -1, -2)) @ v
        return jnp.swapaxes(y, -2, -3)


class ReadsAWeight(nnx.Module):
    """A linear whose kernel is read in place of a call."""

    def __init__(self):
        self.q, self.v = (nnx.Linear(16, 16, use_bias=False, rngs=nnx.Rngs(i)) for i in range(2))

    def __call__(self, x):
        return jnp.tanh(x @ self.q.kernel[...]) + self.v(x)


class Twice(nnx.Module):
    """One linear under two names."""

    def __init__(self):
        self.q = nnx.Linear(16, 16, use_bias=False, rngs=nnx.Rngs(0))
        self.same = self.q
        self.v = nnx.Linear(16, 16, use_bias=False, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.q(x) * self.same(2 * x) + self.v(x)


STYLES = [
    (OwnsWeights, [Target(f"body.w{p}", p, "d h k", layer="a") for p in "qv"], 2),
    (ReadsAWeight, [Target(f"body.{p}.kernel", p, "d (h k)", 4, layer="a") for p in "qv"], 2),
    (Twice, [Target(f"body.{p}.kernel", p, "d (h k)", 4, layer="a") for p in "qv"], 3),
]


class Holder(nnx.Module):
    def __init__(self, body):
        self.body = body

    def __call__(self, x):
        return self.body(x)


@BOTH
@pytest.mark.parametrize(("style", "targets", "uses"), STYLES, ids=lambda v: getattr(v, "__name__", ""))
def test_a_model_is_adapted_however_it_uses_its_weights(style, targets, uses, route, method, perturbed, x):
    base = Holder(style())
    planned = make_plan(base, method, targets)
    model = HoraModel(base, planned, perturbed(init(planned)), route=route, dense="error")
    close(model(x), model.merged()(x))
    assert len(model.report(x).low_rank) == uses
    _, grads = only_adapter(loss_of)(model, x)
    through = jax.grad(lambda phi: loss_of(merge(planned, base, phi), x))(model.adapter())
    for name, value in through["a"].items():
        close(grads["phi"]["a"][name][...], value, 1e-4)


def test_modules_among_the_arguments_keep_what_a_call_changes(method, x):
    class Dropping(nnx.Module):
        def __init__(self):
            self.q, self.dropout = nnx.Linear(16, 16, rngs=nnx.Rngs(0)), nnx.Dropout(0.5)

        def __call__(self, x, rngs):
            return self.dropout(self.q(x), rngs=rngs)

    base, rngs = Dropping(), nnx.Rngs(3)
    planned = make_plan(base, method, Target("q.kernel", "q", "d (h k)", 4, layer="a"))
    model = HoraModel(base, planned, init(planned))
    first, second = model(x, rngs), model(x, rngs)
    assert not jnp.allclose(first, second)
    assert int(rngs.default.count[...]) == 2
    np.testing.assert_array_equal(first, base(x, nnx.Rngs(3)))


@pytest.mark.parametrize(
    "change", [lambda w: 0.9 * w, lambda w: w.swapaxes(1, 2), lambda w: jnp.concatenate([w[1:], w[:1]])]
)
def test_a_call_that_assigns_to_a_planned_weight_is_refused(method, change):
    base = Holder(nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0)))
    base.body.kernel = nnx.Param(jnp.ones((4, 4, 4)))
    planned = make_plan(base, method, Target("body.kernel", "q", "d h k", layer="a"))

    def assign(base, change):
        base.body.kernel[...] = change(base.body.kernel[...])

    model = HoraModel(base, planned, init(planned))
    with pytest.raises(HoraError, match=r"frozen.*body\.kernel"):
        model.apply(assign, change)
    model.apply(assign, lambda w: w)
    model.apply(assign, jax.lax.stop_gradient)
