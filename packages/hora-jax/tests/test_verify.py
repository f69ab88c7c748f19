"""`verify` tries an adapter on real inputs, and says what is wrong with it."""

import re

import jax
from hora_jax import init, verify

from .test_adapt import PARAMS, PLANS, X, einsum, stopped


def test_a_correct_adapter_is_verified():
    planned = PLANS["apart"]
    found = verify(planned, einsum, PARAMS, init(planned), X)
    assert found.ok, str(found)
    assert len(found.uses.low_rank) == 2
    assert found.effect > 100 * found.error


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
