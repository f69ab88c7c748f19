"""A report lists where planned weights are consumed, and which are not."""

import re

import jax
from hora_jax import adapt, init

from .test_adapt import PARAMS, PLANS, X, einsum, heads, normalised, returned


def test_weights_the_function_does_not_use_are_reported():
    planned = PLANS["apart"]
    report = adapt(lambda p, x: heads(x, p["attn"]["q"]), planned).report(PARAMS, init(planned), X)
    assert report.unused == ("attn.v",)
    assert "unused: attn.v" in str(report)


def test_dense_uses_are_printed_with_their_places():
    lines = str(adapt(normalised, PLANS["apart"]).report(PARAMS, init(PLANS["apart"]), X)).splitlines()
    assert [re.sub(r" at .*test_adapt\.py:.*", " at a place", line) for line in lines] == [
        "low-rank: 0, dense: 2, unused: 1",
        *(f"  dense: attn.q in {primitive} at a place" for primitive in ("mul", "div")),
        "  unused: attn.v",
    ]
    assert "  dense: attn.q in output\n" in str(adapt(returned, PLANS["apart"]).report(PARAMS, init(PLANS["apart"]), X))


def test_a_report_needs_no_values():
    shapes = jax.eval_shape(lambda: (PARAMS, init(PLANS["apart"]), X))
    assert len(adapt(einsum, PLANS["apart"]).report(*shapes).low_rank) == 2
