"""Which rows of which weights are adapted, by a model's classes, and whether adapting them would act."""

import hora_torch
import peft
import pytest
import transformers as tf
from hora_spec import HoraError, Layout, ProjectionShape, Site, Window
from hora_torch import HoraConfig, heads, sites
from hora_torch.order import Order
from torch import nn
from torch.distributed.tensor import Shard

from .oracle import adapted
from .test_planning import Attention

TELLING = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def rows(model, **kwargs):
    """Window of each projection of the first layer."""
    layer = hora_torch.plan(model, HoraConfig(r=2, **kwargs)).layers[0]
    return {p: site.layout.window for p, site in layer.sites.items()}


def test_all_rows_of_a_weight_are_no_window():
    assert rows(nn.Sequential(Attention(**TELLING))) == {"q": None, "v": None}


class Mixed(nn.Module):
    """One map of 64 rows."""

    def __init__(self, name):
        super().__init__()
        self.add_module(name, nn.Linear(16, 64))


TWICE = "q:4*4 q2:4*4 k:4*4 v:4*4"
CHOSEN = {
    "a kind is all that is of it": ("mixed", TWICE, ("q", "v"), ["q", "q2", "v"]),
    "a part of a kind": ("mixed", TWICE, ("q2",), ["q2"]),
    "a query beside its gate": ("q_proj", "[4][q:4*8 gate:4*8]", ("q", "v"), ["q"]),
    "a query beside its gate, whatever is wanted of fused weights": ("q_proj", "[4][gate:4*8 q:4*8]", ("v",), ["q"]),
    "two queries under one name": ("q_proj", "q:4*8 q2:4*8", ("v",), ["q", "q2"]),
    "what holds one part": ("mixed", "points:4*16", ("v",), ["points"]),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_the_parts_that_are_wanted_are_chosen(case):
    name, order, wanted, expected = CHOSEN[case]
    model = nn.Sequential(Mixed(name))
    config = HoraConfig(r=2, target_modules=[name], row_order={name: order}, fused_projections=wanted)
    found = list(sites.find_sites(model, f"0.{name}", config))
    assert [place.role for place in found] == expected
    first = found[0].site.layout.window
    assert (first is None) == (len(expected) == 1 and case == "what holds one part")


def test_a_gate_is_no_query_wherever_it_stands():
    model = nn.Sequential(Mixed("q_proj"))
    said = {"target_modules": ["q_proj"], "row_order": {"q_proj": "[4][gate:4*8 q:4*8]"}}
    assert rows(model, **said) == {"q": Window(0, 8, 16, 4)}


def test_parts_that_are_not_wanted_are_refused():
    said = {"target_modules": ["mixed"], "row_order": {"mixed": TWICE}, "fused_projections": ("z",)}
    with pytest.raises(HoraError, match=r"holds one of fused_projections, \('z',\), got '0.mixed' with \['q', 'q2'"):
        hora_torch.plan(nn.Sequential(Mixed("mixed")), HoraConfig(r=2, **said))


NO_TARGETS = {
    "0": "LayerNorm at '0'",
    "1.out_proj": "NonDynamicallyQuantizableLinear at '1.out_proj': its forward is never called, target the "
    "MultiheadAttention",
    "2": "Conv1d at '2': layouts have no axis for a wider kernel, and none for padding (spec L1)",
}


@pytest.mark.parametrize("name", NO_TARGETS)
def test_what_is_no_map_or_is_never_called_is_refused_with_the_reason(name):
    model = nn.Sequential(nn.LayerNorm(4), nn.MultiheadAttention(4, 2), nn.Conv1d(4, 4, 3))
    with pytest.raises(HoraError) as caught:
        list(sites.find_sites(model, name, HoraConfig()))
    start = "targets are Linear, Conv1D and MultiheadAttention modules, and convolutions with a kernel of one, got "
    assert str(caught.value) == start + NO_TARGETS[name]


class Deep(nn.Module):
    """Calls a map under a path of two names."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Sequential()
        self.qkv.linear = nn.Linear(16, 48)


@pytest.mark.parametrize("path", ["", "blocks.0", "a.b.c.d"])
def test_an_attention_is_the_class_that_is_known_to_split_the_rows_however_deep(path, monkeypatch):
    model = nn.Module()
    owner = model
    for name in path.split(".") if path else ():
        owner.add_module(name, nn.Module())
        owner = getattr(owner, name)
    owner.add_module("attn", Deep())
    whole = f"{path}.attn" if path else "attn"
    assert sites.attention_of(model, f"{whole}.qkv.linear") == (f"{whole}.qkv", "linear")

    def known(module, own):
        return Order.parse("q k v") if isinstance(module, Deep) and own == "qkv.linear" else None

    monkeypatch.setattr(sites, "row_order", known)
    assert sites.attention_of(model, f"{whole}.qkv.linear") == (whole, "qkv.linear")
    assert sites.attention_of(model.get_submodule(whole), "qkv.linear") == ("", "qkv.linear")
    assert sites.attention_of(model, whole) == (path, "attn")


class Named(Attention):
    """What is called as a projection is no linear map."""

    def __init__(self):
        super().__init__(**TELLING)
        self.query, self.value = nn.Identity(), nn.LayerNorm(8)


class Own(nn.MultiheadAttention):
    """Holds maps beside its own weights, which its forward does not call."""

    def __init__(self):
        super().__init__(32, 4)
        self.q_proj = nn.Linear(32, 32)


@pytest.mark.parametrize(("build", "expected"), [(Named, ["0.q_proj", "0.v_proj"]), (Own, ["0"])])
def test_what_is_called_as_a_projection_and_is_none_is_left_alone(build, expected):
    model = nn.Sequential(build())
    plan = hora_torch.plan(model, HoraConfig(r=2))
    assert (plan.layers[0].modules, dict(plan.left_out)) == (expected, {})
    names = [f"0.{name}" for name, _ in model[0].named_children()] + ["0"]
    assert [name for name in names if sites.is_candidate(model, name)] == expected


def test_the_targets_of_a_state_dict_are_those_that_made_it(family):
    model, base = adapted(family), family.model()
    entries = model.peft_config["default"].hora_layers
    modules = {site["module"] for entry in entries for site in entry["projections"].values()}
    expected = [name for name, _ in base.named_modules() if name in modules]
    state = peft.get_peft_model_state_dict(model)
    assert sites.targets_of(base, state) == expected
    compiled = {key.replace("base_model.model.", "base_model.model._orig_mod."): value for key, value in state.items()}
    assert sites.targets_of(base, compiled) == expected


def test_what_is_no_linear_map_is_no_target_of_a_state_dict():
    model = nn.Sequential(Named(), Named())
    state = {
        f"base_model.model.0.q_proj.hora_hyper.{name}": None for name in ("b_in", "a.q", "a.v", "b_out.q", "b_out.v")
    }
    assert sites.targets_of(model, state) == ["0.q_proj", "0.v_proj"]


class Both(nn.Module):
    """Holds its projections twice, as one and apart."""

    def __init__(self, **says):
        super().__init__()
        self.num_heads = 4
        self.qkv, self.q_proj, self.v_proj = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 16)
        for name, value in says.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("says", "used"),
    [({}, []), ({"fused_projections": True}, ["0.qkv"]), ({"fused_projections": False}, ["0.q_proj", "0.v_proj"])],
    ids=str,
)
def test_of_what_is_there_twice_that_is_adapted_which_is_known_to_be_used(says, used, monkeypatch):
    model = nn.Sequential(Both(**says))
    for module in (sites, heads):
        monkeypatch.setattr(module, "row_order", lambda _, own: Order.parse("q k v") if own == "qkv" else None)
    reasons = {name: sites.not_in_use(model, name) for name in ("0.qkv", "0.q_proj", "0.v_proj")}
    assert [name for name, reason in reasons.items() if reason is None] == used
    if used:
        assert hora_torch.plan(model, HoraConfig(r=2)).layers[0].modules == used
    else:
        assert "has ['q_proj', 'qkv', 'v_proj'], of which it uses some" in reasons["0.qkv"]
        with pytest.raises(HoraError, match="of which it uses some"):
            hora_torch.plan(model, HoraConfig(r=2))
        assert hora_torch.plan(model, HoraConfig(r=2, target_modules=["qkv"])).layers[0].modules == ["0.qkv"]


def test_keys_of_a_known_class_are_not_said_to_be_adapted_where_they_are_named():
    attention = tf.models.ctrl.modeling_ctrl.MultiHeadAttention(tf.CTRLConfig(n_embd=16, n_head=2))
    assert [sites.where_named(attention, name) for name in ("Wq", "Wk", "Wv", "dense")] == [None] * 4
    model = tf.Mamba2Model(tf.Mamba2Config(hidden_size=16, num_heads=4, head_dim=8, num_hidden_layers=1, vocab_size=8))
    assert "holds x, b, c" in sites.where_named(model, "layers.0.mixer.in_proj")
    assert not sites.is_candidate(model, "layers.0.mixer.in_proj")
    assert [name for name in ("Wq", "Wk", "Wv", "dense") if sites.is_candidate(attention, name)] == ["Wq", "Wv"]


@pytest.mark.parametrize(
    ("order", "holds"),
    [("rows:1", "rows of no head"), ("qk:4*4", "keys that are queries or values, too"), ("q:4*4", None), ("k v", None)],
)
def test_rows_that_are_no_queries_or_values_alone_are_told_of(order, holds, monkeypatch):
    monkeypatch.setattr(sites, "row_order", lambda _, own: Order.parse(order) if own == "mixed" else None)
    reason = sites.where_named(nn.Sequential(Mixed("mixed")), "0.mixed")
    assert reason == (
        holds
        and f"what is neither q nor v is adapted where it is named, 'mixed' of Mixed holds {holds}: add "
        "it to target_modules"
    )


class Indirect(Attention):
    """Calls its projections by another name, and mentions their weights where nothing is computed."""

    def reset_parameters(self):
        nn.init.ones_(self.q_proj.weight)
        nn.init.ones_(self.v_proj.weight)

    def forward(self, x):
        assert self.q_proj.in_features == self.v_proj.in_features
        return [project(x) for project in (self.q_proj, self.v_proj)]


class Bypassing(Attention):
    """Computes with a weight, past its module, where its parent calls it."""

    def forward(self, x):
        return x @ self.q_proj.weight.T + self.v_proj(x)


class Penalised(Attention):
    """Computes with a weight beside what its parent does."""

    def forward(self, x):
        return super().forward(x) + self.q_proj.weight.norm()


def test_a_bypass_is_a_weight_that_is_read_where_something_is_computed():
    for kind in (Indirect, Penalised):
        assert list(rows(nn.Sequential(kind(**TELLING)))) == ["q", "v"]
    with pytest.raises(HoraError, match=r"Bypassing reads q_proj\.weight past it"):
        hora_torch.plan(nn.Sequential(Bypassing(**TELLING)), HoraConfig(r=2, target_modules=["q_proj"]))
    assert list(rows(nn.Sequential(Bypassing(**TELLING)), target_modules=["v_proj"])) == ["v"]


def site(module, parameter="weight", shape=(32, 32), layout=None):
    return Site(module, parameter, shape, layout or Layout(), ProjectionShape(4, shape[0] // 4, shape[1]))


def model_of_every_kind():
    model = nn.Module()
    model.linear, model.norm = nn.Linear(32, 32), nn.LayerNorm(32)
    model.conv1d = tf.pytorch_utils.Conv1D(32, 32)
    model.whole, model.apart = nn.MultiheadAttention(32, 4), nn.MultiheadAttention(32, 4, kdim=16, vdim=16)
    return model


OTHER_PLACES = {
    "a parameter that a map lacks": site("linear", "kernel"),
    "no linear map": site("norm"),
    "a weight that no attention has": site("whole", "weight"),
    "a module inside of an attention": site("whole", "out_proj"),
    "weights of an attention that has one": site("whole", "q_proj_weight"),
    "the one weight of an attention that has three": site("apart", "in_proj_weight", (96, 32)),
    "a bias of an attention": site("whole", "in_proj_bias"),
    "another shape": site("linear", shape=(64, 32)),
    "transposed": site("linear", layout=Layout("d (h k)")),
    "not transposed": site("conv1d"),
    "a window along the other axis": site("linear", layout=Layout("(h k) d", Window(1, 0, 32))),
}


@pytest.mark.parametrize("case", OTHER_PLACES)
def test_f5_a_recorded_place_that_the_model_lacks_is_refused(case):
    with pytest.raises(HoraError, match="load the base model the adapter was trained on"):
        sites.check_recorded(model_of_every_kind(), OTHER_PLACES[case])


@pytest.mark.parametrize(
    "found",
    [
        site("linear"),
        site("conv1d", layout=Layout("d (h k)")),
        site("apart", "q_proj_weight"),
        site("apart", "k_proj_weight", (32, 16)),
        Site("whole", "in_proj_weight", (96, 32), Layout("(h k) d", Window(0, 32, 64)), ProjectionShape(4, 8, 32)),
    ],
    ids=lambda found: f"{found.module}.{found.parameter}",
)
def test_f5_a_recorded_place_of_the_model_is_taken(found):
    sites.check_recorded(model_of_every_kind(), found)


@pytest.mark.parametrize(("axis", "refused"), [(0, False), (1, True)])
def test_a_sharded_weight_is_split_by_its_rows_and_a_sharded_convolution_is_refused(axis, refused, monkeypatch):
    """Told by the placement alone; several processes are in `test_parallel.py`."""
    monkeypatch.setattr(sites, "is_sharded", lambda weight: True)
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 1))
    for module in model:
        module.weight.placements = [Shard(axis)]
    with pytest.raises(HoraError, match="convolution is whole, the weight of '1' is sharded"):
        hora_torch.plan(model, HoraConfig(r=2, target_modules=["1"]))
    if refused:
        with pytest.raises(HoraError, match="sharded by its output rows"):
            hora_torch.plan(model, HoraConfig(r=2, target_modules=["0"]))
    else:
        assert hora_torch.plan(model, HoraConfig(r=2, target_modules=["0"])).layers
