"""What a plan says, and that what is not known for certain is refused, or left out with its reason."""

import hora_torch
import peft
import pytest
import torch
import transformers as tf
from hora_spec import HoraError
from hora_torch import HoraConfig
from hora_torch.layer import HoraLayer
from torch import nn

from .oracle import adapted, assert_unchanged, snapshot


class Attention(nn.Module):
    """Attention of 4 query and 2 key-value heads of width 8, which says of itself what a test wants it to."""

    def __init__(self, *, fused=False, **says):
        super().__init__()
        if fused:
            self.to_qkv = nn.Linear(32, 64)
        else:
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        for name, value in says.items():
            setattr(self, name, value)

    def forward(self, x):
        if hasattr(self, "to_qkv"):
            q, k, v = self.to_qkv(x).split((32, 16, 16), -1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (-1, 8)).transpose(-2, -3) for y in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(-2, -3).flatten(-2)


class Config:
    """A config as models have it, of attributes alone."""

    def __init__(self, **values):
        self.__dict__.update(values)


def heads(model, **kwargs):
    """Head count of each projection of the first layer."""
    layer = hora_torch.plan(model, HoraConfig(r=2, **kwargs)).layers[0]
    return {p: site.projection.num_heads for p, site in layer.sites.items()}


TELLING = {
    "counts": {"num_heads": 4, "num_key_value_heads": 2},
    "counts and width": {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "query and width": {"num_heads": 4, "head_dim": 8},
    "width": {"head_dim": 8},
    "query and groups": {"num_heads": 4, "num_key_value_groups": 2, "head_dim": 8},
    "its config": {"config": Config(num_attention_heads=4, num_key_value_heads=2)},
    "a config of other layers": {"head_dim": 8, "num_key_value_groups": 2, "config": Config(num_key_value_heads=1)},
    "own counts beside a foreign config": {"num_heads": 4, "head_dim": 8, "config": Config(num_attention_heads=8)},
}


@pytest.mark.parametrize("says", TELLING)
def test_heads_are_found_from_whatever_tells(says):
    model = nn.Sequential(Attention(**TELLING[says]))
    assert heads(model) == {"q": 4, "v": 2}
    model = peft.get_peft_model(model, HoraConfig(r=2))
    assert hora_torch.verify(model, torch.randn(1, 5, 32)).ok


CONTRADICTING = {
    "two counts": {"num_heads": 4, "num_attention_heads": 8},
    "count and width": {"num_heads": 8, "head_dim": 8},
    "count and rows": {"num_heads": 3},
    "groups": {"num_heads": 4, "head_dim": 8, "num_key_value_groups": 4},
    "width alone beside its config": {"head_dim": 4, "config": Config(num_attention_heads=4)},
}


@pytest.mark.parametrize("says", CONTRADICTING)
def test_sources_that_disagree_are_an_error_that_shows_them(says):
    model = nn.Sequential(Attention(**CONTRADICTING[says]))
    with pytest.raises(HoraError, match=r"sources agree, got .*=\d") as caught:
        hora_torch.plan(model, HoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, value in CONTRADICTING[says].items():
        if isinstance(value, int) and (says, name) != ("groups", "num_heads"):
            assert f"attention.{name}={value}" in str(caught.value)
    if says != "groups":  # of which the query alone is certain
        with pytest.raises(HoraError, match=r"specify `target_modules`.*sources agree"):
            hora_torch.plan(model, HoraConfig(r=2))


@pytest.mark.parametrize(
    "said",
    [{"num_heads": 8}, {"num_heads": {"q_proj": 2}}, {"num_kv_heads": 4}, {"num_heads": {"v_proj": 1}}],
    ids=str,
)
def test_a_user_who_contradicts_the_model_is_told(said):
    model = nn.Sequential(Attention(num_heads=4, num_key_value_heads=2, head_dim=8))
    with pytest.raises(HoraError, match=r"HoraConfig\.num"):
        hora_torch.plan(model, HoraConfig(r=2, **said))


def test_a_query_count_alone_is_not_taken_for_that_of_grouped_values():
    model = nn.Sequential(Attention())
    with pytest.raises(HoraError, match="num_kv_heads"):
        hora_torch.plan(model, HoraConfig(r=2, num_heads=4))
    assert heads(model, num_heads=4, num_kv_heads=2) == {"q": 4, "v": 2}


def test_the_name_of_a_fused_weight_proves_nothing():
    model = nn.Sequential(Attention(fused=True, num_heads=4, num_key_value_heads=2))
    with pytest.raises(HoraError, match=r"Attention is not known.*row_order"):
        hora_torch.plan(model, HoraConfig(r=2, target_modules=["to_qkv"]))
    with pytest.raises(HoraError, match=r"specify `target_modules`.*row_order"):
        hora_torch.plan(model, HoraConfig(r=2))
    config = HoraConfig(r=2, row_order={"to_qkv": "q k v"})
    (layer,) = hora_torch.plan(model, config).layers
    rows = {p: str(site.layout.rows(site.weight_shape)) for p, site in layer.sites.items()}
    assert rows == {"q": "0:32", "v": "48:64"}
    assert hora_torch.verify(peft.get_peft_model(model, config), torch.randn(1, 5, 32)).ok
    with pytest.raises(HoraError, match="order of rows"):
        HoraConfig(row_order={"to_qkv": "v, k, q"})


def test_a_wrong_order_that_a_user_states_is_found_by_verify():
    model = nn.Sequential(Attention(fused=True, num_heads=4, num_key_value_heads=4))
    wrong = HoraConfig(r=2, row_order={"to_qkv": "q k"}, fused_projections=("q", "k"))
    assert not hora_torch.verify(peft.get_peft_model(model, wrong), torch.randn(1, 5, 32)).ok


def test_the_class_decides_and_a_subclass_that_overrides_it_is_unknown():
    timm = pytest.importorskip("timm")
    known = timm.layers.Attention(32, num_heads=4)

    class Reversed(timm.layers.Attention):
        def forward(self, x, *args, **kwargs):
            return super().forward(x.flip(1))

    assert heads(nn.Sequential(known)) == {"q": 4, "v": 4}
    with pytest.raises(HoraError, match="Reversed is not known"):
        hora_torch.plan(nn.Sequential(Reversed(32, num_heads=4)), HoraConfig(target_modules=["qkv"]))


def test_what_the_default_leaves_out_is_said(families):
    model = nn.Sequential(Attention(head_dim=8), Attention(fused=True, num_heads=4))
    plan = hora_torch.plan(model, HoraConfig(r=2))
    assert [layer.name for layer in plan.layers] == ["0"]
    assert list(plan.left_out) == ["1"]
    assert str(plan).splitlines()[0] == "HoRA adapts 1 of 2 attention modules"
    assert "not 1" in str(plan)
    assert "row_order" in str(plan)
    with pytest.warns(UserWarning, match="HoRA adapts 1 of 2 attention modules"):
        adapted_model = peft.get_peft_model(model, HoraConfig(r=2))
    assert {name for name, module in adapted_model.named_modules() if isinstance(module, HoraLayer)} == {
        "base_model.model.0.q_proj",
        "base_model.model.0.v_proj",
    }


class Beside(Attention):
    """Holds a fused map beside its projections, whose rows are not known."""

    def __init__(self):
        super().__init__(num_heads=4, num_key_value_heads=2)
        self.kv = nn.Linear(32, 32)


PRINTED = """\
HoRA adapts 5 of 7 attention modules, 2 of them in part
  0 and 1 more
    q: q_proj.weight rows 0:32, 4 heads x 8, rank 2; attention.head_dim=8
    v: v_proj.weight rows 0:16, 2 heads x 8, rank 2; attention.head_dim=8, the heads of k_proj=2
  3 and 1 more
    q: q_proj.weight rows 0:32, 4 heads x 8, rank 2; attention.num_heads=4
    v: v_proj.weight rows 0:16, 2 heads x 8, rank 2; attention.num_key_value_heads=2, the heads of k_proj=2, the width \
of a head of q_proj=8
  5
    q: (itself).in_proj_weight rows 0:32, 4 heads x 8, rank 2; the shape of nn.MultiheadAttention
    v: (itself).in_proj_weight rows 64:96, 4 heads x 8, rank 2; the shape of nn.MultiheadAttention
  not 2 and 1 more
    the head count of '....q_proj' must be known and divide its 32 output rows, and all sources agree, got \
attention.num_heads=3: pass"""


def test_a_plan_is_printed_with_what_is_alike_once_and_the_reasons_of_what_is_left_out():
    """Modules are called by numbers here, which are no numbers of the reasons."""
    told = Attention(head_dim=8), Attention(head_dim=8)
    model = nn.Sequential(
        *told, Attention(num_heads=3), Beside(), Beside(), nn.MultiheadAttention(32, 4), Attention(num_heads=3)
    )
    lines = str(hora_torch.plan(model, HoraConfig(r=2))).splitlines()
    expected = PRINTED.splitlines()
    assert lines[: len(expected) - 1] == expected[:-1]
    assert lines[len(expected) - 1].startswith(expected[-1])
    assert lines[len(expected) :][0] == "  not 3 and 1 more"
    assert "Beside is not known and the name '....kv' proves nothing" in lines[-1]
    assert len(lines) == len(expected) + 2


def test_a_plan_of_recorded_layers_tells_maps_from_attention_as_a_new_one_does():
    model = nn.Sequential(Attention(head_dim=8), nn.Linear(32, 8), nn.MultiheadAttention(8, 2))
    config = HoraConfig(r=2, target_modules=["q_proj", "v_proj", "1", "2"])
    plan = hora_torch.plan(model, config)
    assert plan.headline() == "HoRA adapts 2 of 2 attention modules, and 1 maps without heads"
    recorded = [layer.to_json() for layer in plan.layers]
    again = hora_torch.plan(model, HoraConfig(r=2, hora_layers=recorded))
    assert again.headline() == plan.headline()
    assert again.target_modules == {"0.q_proj", "0.v_proj", "1", "2"}
    assert "v_proj.weight rows 0:16, 2 heads x 8, rank 2; recorded in hora_layers" in str(again)
    with pytest.raises(HoraError, match=r"missing here: \['0.q_proj', '0.v_proj', '2'\], not in the adapter: \[\]"):
        hora_torch.plan(model, HoraConfig(r=2, target_modules=["1"], hora_layers=recorded))


OTHERS = {
    "another rank": {"r": 3},
    "another alpha": {"hora_alpha": 8},
    "no alpha": {"hora_alpha": None},
    "another sharing": {"sharing": "a"},
}


@pytest.mark.parametrize("change", OTHERS)
def test_recorded_layers_are_those_of_the_config(change):
    model, said = nn.Sequential(Attention(head_dim=8)), {"r": 2, "hora_alpha": 4}
    recorded = [layer.to_json() for layer in hora_torch.plan(model, HoraConfig(**said)).layers]
    assert hora_torch.plan(model, HoraConfig(**said, hora_layers=recorded)).layers[0].spec.scaling == 2
    with pytest.raises(HoraError, match="config of a loaded adapter is not changed, '0' was trained with"):
        hora_torch.plan(model, HoraConfig(**said | OTHERS[change], hora_layers=recorded))


def test_recorded_layers_are_those_of_the_model():
    recorded = [layer.to_json() for layer in hora_torch.plan(nn.Sequential(Attention(head_dim=8)), HoraConfig()).layers]
    wider = nn.Sequential(Attention(head_dim=8))
    wider[0].v_proj = nn.Linear(32, 32)
    with pytest.raises(HoraError, match=r"0\.v_proj\.weight must have shape \(16, 32\)"):
        hora_torch.plan(wider, HoraConfig(hora_layers=recorded))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_targets_of_one_layer_have_one_rank_and_one_alpha(field):
    model = nn.Sequential(Attention(head_dim=8), Attention(head_dim=8))
    with pytest.raises(HoraError, match="share rank and alpha"):
        hora_torch.plan(model, HoraConfig(r=2, hora_alpha=4, **{field: {"q_proj": 8}}))
    first, second = hora_torch.plan(model, HoraConfig(r=2, hora_alpha=4, **{field: {"0.(q|v)_proj": 8}})).layers
    assert (first.spec.rank, first.spec.alpha) == ((8, 4) if field == "rank_pattern" else (2, 8))
    assert (second.spec.rank, second.spec.alpha) == (2, 4)


IDLE = {
    "rank_pattern": {"q_prj": 4},
    "alpha_pattern": {"q_prj": 4},
    "num_heads": {"q_prj": 4},
    "row_order": {"q_prj": "q:4*8"},
    "layers_to_transform": [0, 2],
    "fused_projections": ["q", "w"],
}


@pytest.mark.parametrize("field", IDLE)
def test_what_speaks_of_no_target_is_refused(field):
    model = nn.ModuleDict({"m": nn.ModuleDict({"layers": nn.ModuleList(Attention(head_dim=8) for _ in range(2))})})
    with pytest.raises(HoraError, match=rf"{field}.*got (2|\['w'\]|\['q_prj'\])"):
        hora_torch.plan(model, HoraConfig(r=2, target_modules=["q_proj", "v_proj"], **{field: IDLE[field]}))


def test_projections_that_cannot_share_one_a_are_refused_before_anything_changes():
    model = nn.Sequential(nn.MultiheadAttention(32, 4, kdim=16, vdim=16))
    with pytest.raises(HoraError, match="equal input widths"):
        hora_torch.plan(model, HoraConfig(r=2, tie_a=True))


@pytest.mark.parametrize("targets", ["all-linear", ".*(q|v)_proj.*"])
def test_what_adapters_are_made_of_is_no_target(families, targets):
    config = HoraConfig(r=2, target_modules=targets)
    expected = hora_torch.plan(families["llama"].model(), config).layers
    assert expected
    assert hora_torch.plan(adapted(families["llama"]), config).layers == expected


def test_all_linear_takes_attention_whole_and_leaves_out_what_nobody_knows():
    model = nn.Sequential(nn.MultiheadAttention(32, 4), nn.Linear(32, 8), Attention(fused=True, num_heads=4))
    plan = hora_torch.plan(model, HoraConfig(r=2, target_modules="all-linear"))
    assert [layer.modules for layer in plan.layers] == [["0"], ["1"]]
    assert list(plan.left_out) == ["2"]
    assert plan.target_modules == {"0", "1"}


def test_targets_are_named_anew_where_something_is_left_out_alone():
    model = nn.Sequential(Attention(head_dim=8), Attention(num_heads=3))
    assert hora_torch.plan(model, HoraConfig(r=2)).target_modules == {"0.q_proj", "0.v_proj"}
    said = {"0.q_proj", "0.v_proj"}
    assert hora_torch.plan(nn.Sequential(model[0]), HoraConfig(r=2, target_modules=said)).target_modules == said


def test_roles_that_occur_twice_in_a_layer_are_told_apart_by_their_modules():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.wq, self.value = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
            self.num_heads = 4

    (layer,) = hora_torch.plan(nn.Sequential(Two()), HoraConfig(r=2)).layers
    assert {p: site.module for p, site in layer.sites.items()} == {"q_proj": "0.q_proj", "wq": "0.wq", "v": "0.value"}


def test_planning_changes_nothing_and_injection_does_what_it_says(family):
    model = family.model()
    before = snapshot(model)
    config = HoraConfig(r=2, hidden_dim=6, head_embed_dim=5)
    values = config.to_dict()
    plan = hora_torch.plan(model, config)
    assert_unchanged(model, before)
    assert config.to_dict() == values
    injected = adapted(family, hidden_dim=6, head_embed_dim=5)
    assert injected.peft_config["default"].hora_layers == [layer.to_json() for layer in plan.layers]
    assert hora_torch.plan(injected, config).layers == plan.layers
    assert all(source for layer in plan.layers for source in layer.sources.values())


def test_one_config_describes_one_adapter(families):
    """It may be used again for equal layers, as for another seed; what it says about others would be lost."""
    config = HoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    models = [peft.get_peft_model(families["llama"].model(), config) for _ in range(2)]
    assert all(model.peft_config["default"] is config for model in models)
    assert config.hora_layers == [
        layer.to_json() for layer in hora_torch.plan(families["llama"].model(), config).layers
    ]
    described = HoraConfig(r=2, target_modules=["q_proj", "v_proj"], hora_layers=config.hora_layers)
    for name in ("mistral", "vit"):
        base = families[name].model()
        before = snapshot(base)
        with pytest.raises(HoraError, match="HoraConfig of its own"):
            peft.get_peft_model(base, config)
        with pytest.raises(HoraError, match="base model"):
            peft.get_peft_model(base, described)
        assert_unchanged(base, before)


def test_an_attention_that_reads_weights_past_the_module_is_refused():
    """WavLM computes attention with the weights of its projections; adapting them would train nothing."""
    model = tf.WavLMModel(
        tf.WavLMConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            conv_dim=[16],
            conv_stride=[4],
            conv_kernel=[8],
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            num_feat_extract_layers=1,
        )
    )
    for config in (HoraConfig(), HoraConfig(target_modules=["q_proj"])):
        with pytest.raises(HoraError, match=r"[qv]_proj\.weight past it"):
            hora_torch.plan(model, config)


def test_a_module_with_two_places_is_refused():
    first, second = Attention(head_dim=8), Attention(head_dim=8)
    second.q_proj = first.q_proj
    with pytest.raises(HoraError, match=r"one module with \['0.q_proj', '1.q_proj'\]"):
        hora_torch.plan(nn.Sequential(first, second), HoraConfig(r=2))


def test_projections_that_were_fused_later_are_told_apart():
    """diffusers keeps the separate projections beside the fused one, which is then the one in use."""
    processors = pytest.importorskip("diffusers.models.attention_processor", reason="diffusers is optional")
    attention = processors.Attention(32, heads=4, dim_head=8, processor=processors.FusedAttnProcessor2_0())
    model = nn.Sequential(attention)
    assert heads(model) == {"q": 4, "v": 4}
    separate = hora_torch.plan(model, HoraConfig(r=2)).layers[0]
    attention.fuse_projections()
    fused = hora_torch.plan(model, HoraConfig(r=2)).layers[0]
    assert separate.modules == ["0.to_q", "0.to_v"]
    assert fused.modules == ["0.to_qkv"]
    every = hora_torch.plan(model, HoraConfig(r=2, target_modules=["to_q", "to_v", "to_qkv"])).layers[0]
    assert list(every.sites) == ["to_q", "to_v", "to_qkv_q", "to_qkv_v"]
