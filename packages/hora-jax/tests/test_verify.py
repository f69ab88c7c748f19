"""`verify` tries an adapter on real inputs, and says what is wrong with it."""

import re

import jax
import jax.numpy as jnp
import pytest
from hora_jax import Target, init, make_plan, verify
from hora_spec import AdapterSpec, HoraError

from .test_adapt import PARAMS, PLANS, X, einsum, stopped


def added(params, x):
    q, v = einsum(params, x)
    return q.reshape(v.shape) + v


def test_a_correct_adapter_is_verified():
    planned = PLANS["apart"]
    found = verify(planned, einsum, PARAMS, init(planned), X)
    assert found.ok is True, str(found)
    assert str(found).startswith("verified: ")
    assert len(found.uses.low_rank) == 2
    assert found.effect > 100 * found.error


def test_products_are_not_rounded_while_it_compares():
    """GPUs round those of float32 to TF32 by default, and adapted and merged differ by a thousandth there."""
    seen = []

    def watched(params, x):
        seen.append(jax.config.jax_default_matmul_precision)
        return einsum(params, x)

    planned = PLANS["apart"]
    with jax.default_matmul_precision("default"):
        assert verify(planned, watched, PARAMS, init(planned), X).ok
        assert jax.config.jax_default_matmul_precision == "default"
    assert seen.count("highest") >= 3  # the adapted function, the merged one, the base


def test_a_float64_base_with_a_float32_adapter_is_verified(x64):
    params = jax.tree.map(lambda v: v.astype("float64"), PARAMS)
    found = verify(PLANS["apart"], einsum, params, init(PLANS["apart"]), X.astype("float64"))
    assert found.ok, str(found)
    assert found.effect > 1e4 * found.error


def test_verify_names_what_does_not_learn_and_what_is_tied():
    planned = PLANS["apart"]
    params = {**PARAMS, "head": PARAMS["attn"]["q"]}
    found = verify(planned, stopped, params, init(planned), X)
    assert any(re.fullmatch(r"b_out\.q of a has no gradient", problem) for problem in found.problems)
    assert any("attn.q is the same array as head" in problem for problem in found.problems)


def test_verify_finds_a_wrong_branch(monkeypatch):
    from hora_jax import routes

    honest = routes.branch
    monkeypatch.setattr(routes, "branch", lambda *args: 2 * honest(*args))
    found = verify(PLANS["apart"], einsum, PARAMS, init(PLANS["apart"]), X, route="branch")
    assert any("differ by" in problem for problem in found.problems)


@pytest.mark.parametrize("axis", [-1, -2])
def test_verify_finds_branches_whose_heads_or_their_rows_are_exchanged(monkeypatch, axis):
    from hora_jax import routes

    planned = make_plan(PARAMS, PLANS["apart"].layers[0].spec, Target("attn.q", "q", "d h k", layer="a"))
    arguments = planned, lambda params, x: einsum(params, x)[0], PARAMS, init(planned), X
    honest = routes.branch
    monkeypatch.setattr(routes, "branch", lambda *args: jnp.flip(honest(*args), axis))
    (problem,) = verify(*arguments, route="branch").problems
    assert "differ by" in problem
    assert verify(*arguments, route="merge").ok


def test_64_roundings_of_the_largest_output_are_allowed():
    for largest in (8.0, 512.0):
        fn = lambda params, x, y=largest: (added(params, x), jnp.array([0, y]))  # noqa: E731
        found = verify(PLANS["apart"], fn, PARAMS, init(PLANS["apart"]), X)
        assert found.ok
        assert found.allowed == 64 * 2**-23 * largest


def test_outputs_of_other_kinds_are_not_compared():
    def fn(params, x):
        y = added(params, x)
        return y, y.argmax(), {"number": 0.5, "nothing": None, "name": 3}

    assert verify(PLANS["apart"], fn, PARAMS, init(PLANS["apart"]), X).ok


def test_an_adapter_without_effect_is_not_verified():
    for fn in (lambda p, x: 0 * added(p, x), lambda p, x: added(p, x).argmax()):
        found = verify(PLANS["apart"], fn, PARAMS, init(PLANS["apart"]), X)
        assert found.problems[0] == "the adapter has no effect on the outputs"
        assert found.ok is False
        assert str(found).startswith("not verified: ")
        assert "  the adapter has no effect" in str(found)


def test_an_infinite_gradient_is_no_gradient():
    spec = AdapterSpec(2, sharing="a")
    planned = make_plan(PARAMS, spec, Target("attn.q", "q", "d h k", layer="a"))

    def fn(params, x):
        y = jnp.einsum("bsd,dhk->bshk", x, params["attn"]["q"])
        return y, jnp.sqrt(y - jax.lax.stop_gradient(y))

    problems = verify(planned, fn, PARAMS, init(planned), X[:1, :1]).problems
    assert "b.q of a has no gradient" in problems


@pytest.mark.parametrize("phi", [{"a": {"b_out.q": jnp.ones(3)}}, 3])
def test_what_is_verified_is_an_adapter_of_the_plan(phi):
    with pytest.raises(HoraError, match="spec S"):
        verify(PLANS["apart"], einsum, PARAMS, phi, X)
