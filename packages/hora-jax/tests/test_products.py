"""Products with a planned weight whose axes stand anywhere, as `jax.lax.dot_general` may place them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hora_jax import Target, adapt, init, make_plan, merge
from hora_spec import AdapterSpec

SPEC = AdapterSpec(2, hidden_dim=3, head_embed_dim=3)
SIZES = {"d": 6, "h": 2, "k": 4, "o": 1, "s": 3}
ROUTES = ("branch", "merge", "plain")


def some(i: int, axes: str) -> jax.Array:
    return jax.random.normal(jax.random.key(i), tuple(SIZES[axis] for axis in axes)) / 2


def planned_as(stored: str):
    """A plan of one weight whose axes are named so; an axis of length one is none of its factors'."""
    params = {"q": some(0, stored)}
    return params, make_plan(params, SPEC, Target("q", "q", " ".join(stored).replace("o", "1"), layer="a"))


def product(x_axes: str, w_axes: str, batch: str, contracted: str, *, left: bool):
    """A bare ``dot_general`` of arrays with these axes."""

    def call(params, x):
        one, two = (w_axes, x_axes) if left else (x_axes, w_axes)
        operands = (params["q"], x) if left else (x, params["q"])
        dims = [tuple(tuple(axes.index(a) for a in names) for axes in (one, two)) for names in (contracted, batch)]
        return jax.lax.dot_general(*operands, tuple(dims))

    return call


CASES = [
    ("hds", "dhk", "h", "d"),
    ("shd", "khd", "h", "d"),
    ("dskh", "hkd", "hd", "k"),
    ("dso", "dohk", "o", "d"),
    ("ods", "hdko", "", "od"),
    ("sd", "dhok", "", "d"),
]


def compared(adapted, fn, params, planned, phi, x):
    """Values and gradients of the adapted function and of the one of merged weights, compiled as one program."""

    def loss(call):
        return jax.value_and_grad(lambda phi, x: jnp.sin(call(phi, x)).sum(), (0, 1))(phi, x)

    return [loss(lambda phi, x, one=one: one(params, phi, x)) for one in adapted], loss(
        lambda phi, x: fn(merge(planned, params, phi), x)
    )


def assert_equal(adapted, fn, params, planned, phi, x):
    got, expected = jax.jit(lambda phi, x: compared(adapted, fn, params, planned, phi, x))(phi, x)
    for one in got:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, expected)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_weight_is_multiplied_wherever_its_axes_stand(case, left, perturbed):
    x_axes, w_axes, batch, contracted = case
    params, planned = planned_as(w_axes)
    fn, phi, x = product(x_axes, w_axes, batch, contracted, left=left), perturbed(init(planned)), some(1, x_axes)
    adapted = [adapt(fn, planned, route=route) for route in ROUTES]
    assert len(adapted[0].report(params, phi, x).low_rank) == 1
    assert_equal(adapted, fn, params, planned, phi, x)


def in_turn(params, free):
    """Joined, rearranged, parted and joined again."""
    both = jnp.concatenate([params["q"], free, params["q"]], axis=1)
    one, two = jnp.split(both.transpose(0, 2, 1).reshape(6, 24)[None], 2, axis=2)
    return jnp.stack([two[0], one[0, :, ::1]], axis=1)


def beside(join):
    return lambda params, free: join([params["q"], free], axis=1)


@pytest.mark.parametrize("join", [beside(jnp.concatenate), beside(jnp.stack), in_turn])
def test_trained_values_beside_a_planned_weight_keep_their_gradient(join, perturbed):
    params, planned = planned_as("dhk")
    x = some(1, "sd")

    def fn(params, free):
        return jnp.tensordot(x, join(params, free), 1)

    adapted = [adapt(fn, planned, route=route, dense="error") for route in ROUTES]
    assert_equal(adapted, fn, params, planned, perturbed(init(planned)), some(2, "dhk"))
