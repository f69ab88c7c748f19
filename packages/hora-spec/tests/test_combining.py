"""Sums of adapters (spec F8)."""

import dataclasses

import numpy as np
import pytest
from hora_spec import (
    Adapter,
    AdapterLayer,
    AdapterSpec,
    HoraError,
    LayerShape,
    Layout,
    ProjectionShape,
    Site,
    Window,
    combine,
    load_adapter,
    param_shapes,
    reference,
    save_adapter,
)

SPECS = {
    "hora": AdapterSpec(2, hidden_dim=4, head_embed_dim=3, alpha=3.0),
    "paper": AdapterSpec.paper(3),
    "a": AdapterSpec(1, sharing="a"),
    "b": AdapterSpec(2, sharing="b", hidden_dim=4, head_embed_dim=3),
    "none": AdapterSpec(3, sharing="none", alpha=0.5),
    "gated": AdapterSpec(2, hidden_dim=4, head_embed_dim=3, residual=True, gate=0.5),
    "tied and fixed": AdapterSpec(2, hidden_dim=4, head_embed_dim=3, a_source="fixed", tie_a=True),
}


def site(module, heads=4):
    return Site(module, "weight", (8, 6), Layout(), ProjectionShape(heads, 8 // heads, 6))


SITES = {"q": site("attn.q"), "v": site("attn.v", heads=2)}


def layer(spec, sites=None, seed=0):
    sites = SITES if sites is None else sites
    shape, rng = LayerShape({p: place.projection for p, place in sites.items()}), np.random.default_rng(seed)
    params = {key: rng.normal(size=size).astype(np.float32) for key, size in param_shapes(spec, shape).items()}
    return AdapterLayer(spec, sites, params)


def adapter(name, seed=0, **kwargs):
    return Adapter({"attn": layer(SPECS[name], seed=seed, **kwargs)}, {"task_type": "CAUSAL_LM", "r": 99})


def deltas(whole):
    return {
        (name, p): delta
        for name, one in whole.layers.items()
        for p, delta in reference.delta(one.spec, one.shape, one.params).items()
    }


@pytest.mark.parametrize("one", SPECS)
@pytest.mark.parametrize("two", SPECS)
def test_f8_the_delta_of_a_sum_is_the_sum_of_the_deltas(one, two, tmp_path):
    terms = [adapter(one), adapter(two, seed=1)]
    total = combine(terms, [0.5, -2.0])
    own = [deltas(term) for term in terms]
    for key, delta in deltas(total).items():
        np.testing.assert_allclose(delta, 0.5 * own[0][key] - 2.0 * own[1][key], rtol=1e-5, atol=1e-5)
    spec = total.layers["attn"].spec
    assert spec.rank == SPECS[one].rank + SPECS[two].rank
    assert spec.sharing == ("a" if SPECS[one].shares_a and SPECS[two].shares_a else "none")
    save_adapter(tmp_path / "sum", total)
    assert {key: value.tolist() for key, value in deltas(load_adapter(tmp_path / "sum")).items()} == {
        key: value.tolist() for key, value in deltas(total).items()
    }


def test_f8_a_term_that_lacks_a_projection_or_a_layer_adds_nothing_there():
    narrow = {"v": SITES["v"]}
    one = Adapter({"attn": layer(SPECS["hora"], narrow), "other": layer(SPECS["hora"], {"q": site("other.q")})})
    two = adapter("paper", seed=1)
    total = combine([one, two], [1.0, 1.0])
    assert list(total.layers["attn"].sites) == ["q", "v"]
    assert {name: found.spec.rank for name, found in total.layers.items()} == {"attn": 5, "other": 2}
    found, own = deltas(total), (deltas(one), deltas(two))
    np.testing.assert_allclose(found["attn", "q"], own[1]["attn", "q"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["attn", "v"], own[0]["attn", "v"] + own[1]["attn", "v"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["other", "q"], own[0]["other", "q"], rtol=1e-5, atol=1e-6)


def test_f8_the_leader_is_the_first_module_in_model_order():
    one, two = (adapter("a", sites={p: SITES[p]}) for p in "vq")
    with pytest.raises(HoraError, match="pass order"):
        combine([one, two], [1.0, 1.0])
    assert combine([one, two], [1.0, 1.0], order=["attn.q", "attn.v"]).layers["attn"].leader == "attn.q"
    with pytest.raises(HoraError, match=r"none for \['attn.q'\]"):
        combine([one, two], [1.0, 1.0], order=["attn.v"])


def test_f8_weights_are_finite_and_one_for_each():
    for terms, weights in (([], []), ([adapter("a")], []), ([adapter("a")], [float("nan")])):
        with pytest.raises(HoraError, match="finite weight"):
            combine(terms, weights)


@pytest.mark.parametrize("other", [{"q": site("attn.q", heads=2)}, {"rows": site("attn.q")}], ids=["heads", "name"])
def test_f8_terms_that_disagree_are_refused(other):
    with pytest.raises(HoraError, match=r"agree on rows and heads|adapted once"):
        combine([adapter("a"), adapter("a", sites=other)], [1.0, 1.0])


def test_f8_parts_of_a_weight_that_do_not_overlap_are_adapted_together():
    windows = {"q": Window(0, 0, 4), "v": Window(0, 4, 8)}
    half = ProjectionShape(2, 2, 6)
    parts = {p: Site("attn.qv", "weight", (8, 6), Layout("(h k) d", w), half) for p, w in windows.items()}
    one, two = (adapter("a", sites={p: part}) for p, part in parts.items())
    assert combine([one, two], [1.0, 1.0]).layers["attn"].modules == ["attn.qv"]


def test_f8_modules_trained_whole_have_no_sum():
    whole = dataclasses.replace(adapter("a"), modules={"score.weight": np.ones(2, np.float32)})
    with pytest.raises(HoraError, match="trained whole"):
        combine([whole], [1.0])


def test_f8_a_sum_that_overflows_is_refused():
    with pytest.raises(HoraError, match="finite"):
        combine([adapter("a")], [1e300])
