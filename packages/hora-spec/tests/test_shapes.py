"""Projections, layers and canonical parameters."""

import numpy as np
import pytest
from hora_spec import (
    AdapterSpec,
    HoraError,
    LayerShape,
    ProjectionShape,
    check_params,
    count_params,
    init_params,
    is_trained,
    name_of_a,
    param_shapes,
)

GQA = LayerShape({"v": ProjectionShape(2, 5, 7), "q": ProjectionShape(4, 3, 6)})


@pytest.mark.parametrize("values", [(0, 1, 1), (1, -2, 1), (1, 1, 1.5), (True, 1, 1)])
def test_s3_projection_sizes_are_positive_integers(values):
    with pytest.raises(HoraError, match="must be an integer of at least 1"):
        ProjectionShape(*values)


def test_s3_head_dim_follows_from_embed_dim():
    layer = LayerShape.attention(768, 12)
    assert layer == LayerShape({"q": ProjectionShape(12, 64, 768), "v": ProjectionShape(12, 64, 768)})
    assert LayerShape.attention(2048, 8, num_kv_heads=1, head_dim=256)["v"].weight_shape == (256, 2048)
    with pytest.raises(HoraError, match=r"num_heads must divide embed_dim, got 7 and 768.*\(spec S3\)"):
        LayerShape.attention(768, 7)
    with pytest.raises(HoraError, match=r"got \['o'\].*\(spec S3\)"):
        LayerShape.attention(768, 12, targets=("q", "o"))


def test_s4_order_of_projections_does_not_matter():
    swapped = LayerShape({"q": GQA["q"], "v": GQA["v"]})
    assert list(GQA) == ["q", "v"]
    assert swapped == GQA
    assert hash(swapped) == hash(GQA)


@pytest.mark.parametrize("name", ["", "q.v", "0q", "q v", "q/v", None])
def test_s4_names_are_identifiers(name):
    with pytest.raises(HoraError, match=r"\(spec S4\)"):
        LayerShape({name: ProjectionShape(1, 1, 1)})


def test_s4_empty_layers_are_refused():
    with pytest.raises(HoraError, match=r"at least one projection.*\(spec S4\)"):
        LayerShape({})
    with pytest.raises(HoraError, match=r"\(spec S4\)"):
        LayerShape.attention(8, 2, targets=())
    with pytest.raises(HoraError, match=r"must be a ProjectionShape.*\(spec S4\)"):
        LayerShape({"q": (4, 3, 6)})


def test_s5_head_counts_divide_the_largest():
    assert (GQA.num_heads, GQA.group_size("q"), GQA.group_size("v")) == (4, 1, 2)
    with pytest.raises(HoraError, match=r"divides the largest, 6, got 4 for 'v'.*\(spec S5\)"):
        LayerShape({"q": ProjectionShape(6, 1, 1), "v": ProjectionShape(4, 1, 1)})
    with pytest.raises(HoraError, match=r"\(spec S3\)|at least 1"):
        LayerShape.attention(8, 2, num_kv_heads=-1)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"a_source": "hypernetwork"},
            {
                "a_seed": (2,),
                "a_in": (9, 2),
                "a_out.q": (6, 9),
                "a_out.v": (7, 9),
                "head_embed": (4, 8, 2),
                "b_in": (9, 8),
                "b_out.q": (3, 9),
                "b_out.v": (5, 9),
            },
        ),
        (
            {"residual": True},
            {
                "a.q": (2, 6),
                "a.v": (2, 7),
                "head_embed": (4, 8, 2),
                "b_in": (9, 8),
                "b_out.q": (3, 9),
                "b_out.v": (5, 9),
                "b.q": (4, 3, 2),
                "b.v": (2, 5, 2),
            },
        ),
        ({"sharing": "a"}, {"a.q": (2, 6), "a.v": (2, 7), "b.q": (4, 3, 2), "b.v": (2, 5, 2)}),
        ({"sharing": "none"}, {"a.q": (4, 2, 6), "a.v": (2, 2, 7), "b.q": (4, 3, 2), "b.v": (2, 5, 2)}),
        (
            {"sharing": "b"},
            {
                "a.q": (4, 2, 6),
                "a.v": (2, 2, 7),
                "head_embed": (4, 8, 2),
                "b_in": (9, 8),
                "b_out.q": (3, 9),
                "b_out.v": (5, 9),
            },
        ),
    ],
)
def test_s6_canonical_parameters(fields, expected):
    spec = AdapterSpec(2, hidden_dim=9, head_embed_dim=8, **fields)
    shapes = param_shapes(spec, GQA)
    assert shapes == expected
    assert list(shapes) == list(expected)
    assert count_params(spec, GQA) == sum(np.prod(shape) for shape in expected.values())


SAME_WIDTH = LayerShape({"q": ProjectionShape(4, 3, 6), "v": ProjectionShape(2, 5, 6)})


def test_s6_a_fixed_a_is_stored_and_not_counted_as_trained():
    spec = AdapterSpec(2, sharing="a", a_source="fixed")
    assert param_shapes(spec, GQA) == param_shapes(spec.replace(a_source="direct"), GQA)
    assert [key for key in param_shapes(spec, GQA) if not is_trained(spec, key)] == ["a.q", "a.v"]
    assert count_params(spec, GQA) == 4 * 3 * 2 + 2 * 5 * 2
    assert count_params(spec, GQA, trained=False) == count_params(spec.replace(a_source="direct"), GQA)


def test_s6_a_tied_a_stands_once():
    spec = AdapterSpec(2, sharing="a", tie_a=True)
    assert param_shapes(spec, SAME_WIDTH) == {"a": (2, 6), "b.q": (4, 3, 2), "b.v": (2, 5, 2)}
    assert not is_trained(spec.replace(a_source="fixed"), "a")
    assert all(name_of_a(spec, p) == "a" for p in SAME_WIDTH)


def test_s6_gates_follow_the_residual():
    shapes = param_shapes(AdapterSpec(2, residual=True, gate=0.5), GQA)
    assert list(shapes.items())[-2:] == [("gate.q", (1,)), ("gate.v", (1,))]


def test_s8_a_tied_a_needs_one_width():
    with pytest.raises(HoraError, match=r"equal input widths, got {'q': 6, 'v': 7}.*\(spec S8\)"):
        param_shapes(AdapterSpec(2, tie_a=True), GQA)


def test_s6_llama_7b_has_the_papers_parameter_count():
    layer = LayerShape.attention(4096, 32)
    assert 32 * count_params(AdapterSpec.paper(32), layer) == 6_096_384


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("b_in"), r"missing \['b_in'\]"),
        (lambda p: p.update(extra=p["b_in"]), r"extra \['extra'\]"),
        (lambda p: p.update(b_in=p["b_in"].T), r"b_in must have shape \(9, 8\), got \(8, 9\): transpose first"),
        (lambda p: p.update(b_in=p["b_in"].astype(int)), "b_in must be floating, got int64"),
        (lambda p: p["b_in"].__setitem__((0, 0), np.nan), "b_in must be finite"),
        (lambda p: p["head_embed"].__setitem__((0, 0, 0), np.inf), "head_embed must be finite"),
    ],
)
def test_s7_unfit_parameters_are_refused(change, message):
    spec = AdapterSpec(2, hidden_dim=9, head_embed_dim=8)
    params = init_params(spec, GQA, 0, "layer")
    check_params(spec, GQA, params)
    change(params)
    with pytest.raises(HoraError, match=rf"layer 'attn': .*{message}"):
        check_params(spec, GQA, params, name="attn")
