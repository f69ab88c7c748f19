"""A planned weight stays one through operations that only move its values, whichever factor has which of its axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hora_jax.follow import regroup
from hora_jax.views import View
from hora_jax.walk import Walk
from hora_spec import HoraError
from jax import lax

SHAPES = {
    "one of a": ((4, 2, 3), (0,), (1, 2)),
    "one of b": ((4, 2, 3), (1, 2), (0,)),
    "shared": ((4, 2, 3), (0, 2), (0, 1)),
    "length one": ((1, 4, 3), (1,), (2,)),
}
"""Shape, axes of A, and axes of B; of a stack, both have the axis of layers."""


def some(i: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(i).normal(size=shape), "float32")


def view_of(kind: str, seed: int = 0, **flags: bool) -> View:
    shape, *owned = SHAPES[kind]
    sizes = [[n if axis in own else 1 for axis, n in enumerate(shape)] for own in owned]
    a, b = (some(i + seed, *own, 2) for i, own in enumerate(sizes))
    return View(some(9 + seed, *shape), a, b, f"w{seed}", constant=True, axes=(0, 1, 2), **flags)


def walked(fn, *values, dense="allow"):
    walk = Walk("branch", dense)
    arrays = [value.w if isinstance(value, View) else value for value in values]
    return walk.run(jax.make_jaxpr(lambda *arrays: jax.tree.leaves(fn(*arrays)))(*arrays), values)


def assert_follows(fn, *values):
    """Each result is a view of the moved weight; its dense value is that of the function on dense weights."""
    whole = jax.tree.leaves(fn(*(value.dense() if isinstance(value, View) else value for value in values)))
    base = jax.tree.leaves(fn(*(value.w if isinstance(value, View) else value for value in values)))
    for got, w, expected in zip(walked(fn, *values, dense="error"), base, whole, strict=True):
        assert isinstance(got, View)
        np.testing.assert_array_equal(got.w, w)
        np.testing.assert_allclose(got.dense(), expected, rtol=1e-5, atol=1e-5)


MOVES = {
    "transpose": lambda w: w.transpose(2, 0, 1),
    "new axes": lambda w: (w[None], w[:, None, :, None]),
    "and back": lambda w: w[:, None].squeeze(1),
    "slice": lambda w: (w[:, 1:], w[..., :2], w[:, :1]),
    "steps": lambda w: (w[:, ::2], w[..., 1::2]),
    "split": lambda w: (jnp.split(w, [1], 1), jnp.split(w, [1, 2], 2)),
    "unstack": lambda w: [jnp.unstack(w, axis=axis) for axis in range(3)],
    "dynamic slice": lambda w: lax.dynamic_slice(w, (0, jnp.int32(1), 5), (1, 1, 2)),
    "reshape": lambda w: (w.reshape(w.shape[0], -1, w.shape[1], 1, 3), w.reshape(1, -1, 1, w.shape[1], 3)),
    "parts": lambda w: w[..., :2].reshape(*w.shape[:2], 1, 2).swapaxes(1, 2),
    "an axis joined with one of length one": lambda w: w[:, None].reshape(w.shape),
    "barrier": lambda w: lax.optimization_barrier((w, 1.0))[0],
    "beside itself": lambda w: [jnp.concatenate([w, w], axis) for axis in range(3)],
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("move", MOVES)
def test_a_moved_weight_is_the_moved_sum_of_weight_and_delta(kind, move):
    assert_follows(MOVES[move], view_of(kind))


JOINS = {"concatenate": jnp.concatenate, "stack": jnp.stack}


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("join", JOINS)
def test_weights_and_other_values_side_by_side_are_one_weight(join, axis):
    one, two, three = (view_of(kind, 20 * i) for i, kind in enumerate(("one of a", "one of b", "shared")))
    assert_follows(lambda *parts: JOINS[join](parts, axis), one, some(7, 4, 2, 3), two, three)


def test_the_whole_is_constant_where_all_parts_are():
    def constant(*parts):
        return walked(lambda *parts: jnp.concatenate(parts), *parts)[0].constant

    one, two = view_of("one of a"), view_of("shared", 20)
    assert constant(one, two)
    assert not constant(one, some(1, 4, 2, 3), two)
    assert not constant(one, View(two.w, two.a, two.b, "trained", constant=False))


@pytest.mark.parametrize("kind", ["codes", "decoded"])
@pytest.mark.parametrize("join", JOINS)
def test_codes_are_not_joined(kind, join):
    with pytest.raises(HoraError, match="a quantised weight is followed"):
        walked(lambda *parts: JOINS[join](parts), view_of("shared"), view_of("shared", 20, **{kind: True}))


MIXED = {
    "axes of both factors joined": lambda w: w.reshape(w.shape[0] * w.shape[1], 3),
    "an order of its own": lambda w: lax.reshape(w, (3, w.shape[0], w.shape[1]), dimensions=(2, 0, 1)),
    "copies": lambda w: (jnp.broadcast_to(w, (2, *w.shape)), jnp.broadcast_to(w[:1], (2, *w.shape[1:]))),
    "another kind of numbers": lambda w: w.astype(int),
}


@pytest.mark.parametrize("mix", MIXED)
def test_what_no_pair_of_factors_describes_is_the_sum(mix):
    view = view_of("one of a")
    for got, expected in zip(walked(MIXED[mix], view), jax.tree.leaves(MIXED[mix](view.dense())), strict=True):
        assert isinstance(got, jax.Array)
        np.testing.assert_array_equal(got, expected)


def test_only_a_weight_in_its_own_order_is_untouched():
    def untouched(fn):
        return walked(fn, view_of("shared"))[0].untouched

    assert untouched(lambda w: lax.stop_gradient(lax.optimization_barrier(w)).transpose(1, 2, 0).transpose(2, 0, 1))
    assert not any(map(untouched, [lambda w: w.swapaxes(1, 2), lambda w: w[:1], lambda w: w.astype("bfloat16")]))


def test_gradients_stop_where_those_of_the_weight_do():
    view = view_of("one of a")

    def value(a, fn):
        return walked(fn, View(view.w, a, view.b, "w", constant=True))[0].dense().sum()

    assert not jax.grad(value)(view.a, lax.stop_gradient).any()
    assert jax.grad(value)(view.a, lambda w: w.transpose(1, 0, 2)).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_m1_a_dense_weight_is_rounded_once(dtype):
    """A delta of half a step above one is lost where it is rounded to one half of a step first."""
    step = float(jnp.finfo(dtype).eps)
    view = View(
        jnp.ones((1, 1), dtype), jnp.full((1, 1, 1), step * (0.5 + step)), jnp.ones((1, 1, 1)), "w", constant=True
    )
    assert view.dense().dtype == dtype
    if dtype != "float32":
        assert view.dense().item() == 1 + step


def test_a_dense_weight_is_summed_at_the_highest_precision():
    with jax.default_matmul_precision("bfloat16"):
        program = str(jax.make_jaxpr(View.dense)(view_of("shared")))
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == program.count("dot_general") == 1


@pytest.mark.parametrize(
    ("old", "new", "groups"),
    [
        ((2, 3), (6,), [((0, 1), (6,))]),
        ((6,), (2, 1, 3), [((0,), (2, 1, 3))]),
        ((1, 4, 5), (4, 5, 1), [((0, 1), (4,)), ((2,), (5,)), ((), (1,))]),
        ((4, 6), (8, 3), [((0, 1), (8, 3))]),
    ],
)
def test_axes_are_regrouped(old, new, groups):
    assert regroup(old, new) == groups
