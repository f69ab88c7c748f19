"""Codes of quantised weights are followed, entry by entry, to what they stand for, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hora_jax import Target, adapt, init, make_plan
from hora_jax.views import View
from hora_jax.walk import Walk
from hora_spec import AdapterSpec, HoraError

from .test_follow import SHAPES, view_of, walked

TABLE = jnp.asarray([-1.0, -0.5, -0.25, 0.0, 0.125, 0.25, 0.5, 1.0])


def codes_of(kind: str = "one of a", path: str = "w") -> View:
    view = view_of(kind)
    w = jnp.asarray(np.random.default_rng(3).integers(0, 8, SHAPES[kind][0]), "int8")
    return View(w, view.a, view.b, path, constant=False, codes=True, axes=(0, 1, 2))


def wide(codes):
    return codes.astype("float32")


FOLLOWED = {
    "scaled": (lambda c: wide(c) * 0.5, lambda d: d),
    "from a zero point": (lambda c: (wide(c) - 8.0) * 0.5, lambda d: d),
    "from a table": (lambda c: TABLE[c] * 0.5, lambda d: d),
    "taken from a table": (lambda c: jnp.take(TABLE, c) * 0.5, lambda d: d),
    "transposed": (lambda c: wide(c.transpose(2, 0, 1)) * 0.5, lambda d: d.transpose(2, 0, 1)),
    "sliced": (lambda c: wide(c[:, :, 1:]) * 0.5, lambda d: d[:, :, 1:]),
    "in tiles": (
        lambda c: (wide(c.reshape(4, 3, 2)) * jnp.arange(1.0, 4).reshape(1, 3, 1)).reshape(4, 2, 3),
        lambda d: d,
    ),
    "folded for a while": (lambda c: (wide(c.reshape(6, 4)) - 3.0).reshape(4, 2, 3) * 0.5, lambda d: d),
}


@pytest.mark.parametrize("how", FOLLOWED)
def test_decoded_codes_are_the_weight_that_a_delta_is_added_to(how):
    decode, move = FOLLOWED[how]
    view = codes_of()
    (got,) = walked(decode, view)
    assert (got.codes, got.decoded, got.untouched) == (False, True, False)
    delta = View(jnp.zeros(view.w.shape), view.a, view.b, "w", constant=True).dense()
    np.testing.assert_allclose(got.w, decode(view.w))
    np.testing.assert_allclose(got.dense(), decode(view.w) + move(delta), rtol=1e-5, atol=1e-5)


REFUSED = {
    "another order by a gather": lambda c, _: wide(c[jnp.asarray([3, 1, 2, 0])]) * 0.5,
    "copies": lambda c, _: wide(jnp.broadcast_to(c, (2, *c.shape))) * 0.5,
    "a table of rows": lambda c, _: jnp.stack([TABLE, TABLE], 1)[c] * 0.5,
    "sums over codes": lambda c, _: wide(jnp.cumsum(c, 0)) * 0.5,
    "a part while folded": lambda c, _: wide(c.reshape(8, 3)[1:]) * 0.5,
    "a scale while folded": lambda c, _: wide(c.reshape(6, 4)) * 0.5,
    "two weights": lambda c, other: wide(c + other) * 0.5,
    "codes and what they stand for": lambda c, _: wide(c) * (wide(c) * 0.5),
    "a square": lambda c, _: wide(c) * wide(c),
    "an integer scale": lambda c, _: c * jnp.int8(2),
    "nothing": lambda c, _: c,
}


@pytest.mark.parametrize("how", REFUSED)
def test_other_codes_are_refused(how):
    def dense():
        found = walked(REFUSED[how], codes_of("shared"), codes_of("shared", "other"))
        assert not any(isinstance(value, View) and value.decoded for value in found)
        return [Walk("branch", "allow").plain(value, None) for value in found]

    with pytest.raises(HoraError, match="through one scale"):
        dense()


def test_changed_codes_are_not_the_leaf_as_it_was_given():
    def untouched(fn):
        return walked(fn, codes_of())[0].untouched

    assert untouched(lambda c: c)
    assert not any(map(untouched, [lambda c: c + 1, lambda c: c.reshape(4, 3, 2), lambda c: c.reshape(2, 2, 6)]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_enough_for_a_sum_and_for_factors(dtype):
    params = {"q": jnp.ones((4, 2, 2), dtype)}
    planned = make_plan(params, AdapterSpec(2), Target("q", "q", "d h k", layer="a"))
    x = jax.ShapeDtypeStruct((3, 4), dtype)
    report = adapt(lambda p, x: (jnp.einsum("bd,dhk->bhk", x, p["q"]), jnp.tanh(p["q"])), planned).report(
        params, init(planned), x
    )
    assert (len(report.low_rank), len(report.dense)) == (1, 1)
    assert adapt(lambda p: jnp.tanh(p["q"]), planned)(params, init(planned)).dtype == dtype
