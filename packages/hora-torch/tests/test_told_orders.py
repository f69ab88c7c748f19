"""Orders of rows that a user tells for a class that nobody knows, and what of them is refused."""

import hora_torch
import peft
import pytest
import torch
import transformers as tf
from hora_spec import HoraError, ProjectionShape, load_adapter, to_lora
from hora_torch import HoraConfig
from hora_torch.order import Order
from torch import nn

from .oracle import agree, differ, evaluate, merged, written

HEADS, KV_HEADS, WIDTH = 8, 4, 4


@pytest.mark.parametrize(
    ("text", "one"),
    [
        ("points:1", True),
        ("q:1", False),
        ("points:2", False),
        ("points:8*4", False),
        ("q k", False),
        ("k:2*4 p:2*4", False),
    ],
)
def test_s3_rows_are_one_map_where_they_are_one_part_of_no_role_without_heads(text, one):
    assert Order.parse(text).is_one_map is one


class Split(nn.Module):
    """Attention whose output rows are split by a function that a test gives: from (..., rows) to q, k, v by heads."""

    def __init__(self, rows, split, **says):
        super().__init__()
        self.mixed, self.split = nn.Linear(16, rows), split
        for name, value in says.items():
            setattr(self, name, value)

    def forward(self, x):
        q, k, v = (y.transpose(-2, -3) for y in self.split(self.mixed(x)))
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(-2, -3).flatten(-2)


def by_head(y):
    return y.unflatten(-1, (HEADS, 3 * WIDTH)).chunk(3, -1)


def by_group(y):
    parts = y.unflatten(-1, (KV_HEADS, 4, WIDTH)).split((2, 1, 1), -2)
    return [part.flatten(-3, -2) for part in parts]


def in_parts(y):
    q, v, k = y.unflatten(-1, (2, 3, HEADS // 2, WIDTH)).unbind(-3)
    return [part.flatten(-3, -2) for part in (q, k, v)]


def unequal(y):
    return y.unflatten(-1, (HEADS, 2 * WIDTH + 6)).split((WIDTH, WIDTH, 6), -1)


def gated(y):
    q, _, k, v = y.unflatten(-1, (HEADS, 4 * WIDTH)).chunk(4, -1)
    return q, k, v


def plain(y):
    q, k, v = y.split((HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH), -1)
    return [part.unflatten(-1, (-1, WIDTH)) for part in (q, k, v)]


COUNTS = {"num_heads": HEADS, "num_kv_heads": HEADS}
GROUPED = {"num_heads": HEADS, "num_kv_heads": KV_HEADS}
TOLD = {
    "by head": (3 * HEADS * WIDTH, by_head, "[head][q k v]", COUNTS),
    "by head, in numbers": (3 * HEADS * WIDTH, by_head, "[8][q:8*4 k:8*4 v:8*4]", {}),
    "by head, one count": (3 * HEADS * WIDTH, by_head, "[head][q k v]", {"num_heads": HEADS}),
    "by group": (4 * KV_HEADS * WIDTH, by_group, "[group][q k v]", GROUPED),
    "in parts": (3 * HEADS * WIDTH, in_parts, "[2][q v k]", COUNTS),
    "unequal widths": (HEADS * (2 * WIDTH + 6), unequal, "[8][q:8*4 k:8*4 v:8*6]", {}),
    "gated": (4 * HEADS * WIDTH, gated, "[8][q:8*4 gate:8*4 k:8*4 v:8*4]", {}),
    "plain": (4 * KV_HEADS * WIDTH, plain, "q k v", GROUPED),
    "plain, in numbers": (4 * KV_HEADS * WIDTH, plain, "q:8*4 k:4*4 v:4*4", {}),
}


def base(rows, split, **says):
    torch.manual_seed(0)
    return nn.Sequential(Split(rows, split, **says)).eval()


def told(order, **kwargs):
    settings = {"r": 2, "hidden_dim": 6, "head_embed_dim": 5, "target_modules": ["mixed"], "init_weights": False}
    return HoraConfig(**settings, row_order={"mixed": order}, **kwargs)


def inputs():
    return {"input": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("name", TOLD)
def test_a_told_order_is_adapted_merged_saved_and_exported_as_one(name, tmp_path):
    rows, split, order, counts = TOLD[name]
    model = peft.get_peft_model(base(rows, split), told(order, **counts)).eval()
    adapted = evaluate(model, inputs())
    assert hora_torch.verify(model, inputs()["input"]).ok

    model.save_pretrained(tmp_path / "hora")
    differ(adapted, evaluate(base(rows, split), inputs()))
    double = {"input": inputs()["input"].double()}
    agree(adapted, evaluate(merged(base(rows, split), written(tmp_path / "hora")), double).float())
    agree(adapted, evaluate(peft.PeftModel.from_pretrained(base(rows, split), tmp_path / "hora"), inputs()))
    hora_torch.export_lora(model, tmp_path / "lora")
    agree(adapted, evaluate(peft.PeftModel.from_pretrained(base(rows, split), tmp_path / "lora"), inputs()))

    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.merge_adapter()
    agree(adapted, evaluate(model, inputs()))
    model.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["by head", "by group", "gated"])
def test_rows_of_k_and_of_gates_are_never_touched(name, tmp_path):
    rows, split, order, counts = TOLD[name]
    model = peft.get_peft_model(base(rows, split), told(order, **counts))
    delta = model.base_model.model[0].mixed.get_delta_weight("default")
    with torch.no_grad():
        parts = dict(zip("qkv", split(delta.T), strict=True))
    assert parts["q"].abs().sum() > 0
    assert parts["v"].abs().sum() > 0
    assert parts["k"].abs().sum() == 0
    model.save_pretrained(tmp_path)
    (module,) = to_lora(load_adapter(tmp_path)).values()
    torch.testing.assert_close(torch.from_numpy(module.alpha / module.rank * module.b @ module.a).float(), delta)


def test_a_wrong_order_is_found_by_verify():
    rows, split, _, counts = TOLD["by head"]
    model = peft.get_peft_model(base(rows, split), told("q k v", **counts))
    assert not hora_torch.verify(model, inputs()["input"]).ok


def test_an_order_may_name_attributes_which_are_printed_as_sources():
    rows, split, _, _ = TOLD["unequal widths"]
    model = base(rows, split, num_heads=HEADS, width=WIDTH, value_width=6)
    order = "[num_heads][q:num_heads*width k:num_heads*width v:num_heads*value_width]"
    plan = hora_torch.plan(model, told(order))
    assert plan.layers[0].sources["v"] == "attention.num_heads=8, attention.width=4, attention.value_width=6"
    assert "rows 8:14 of each 14 of 112, 8 heads x 6" in str(plan)


REFUSED = {
    "not all rows": ("[8][q:8*4 k:8*4 v:8*3]", {}, {}, "make up its 96 output rows"),
    "blocks that split heads": ("[3][q:8*4 k:8*4 v:8*4]", {}, {}, "in blocks of whole heads"),
    "another count than the user's": (
        "[8][q:8*4 k:8*4 v:8*4]",
        {"num_heads": 4},
        {},
        "HoraConfig.num_heads=4: correct",
    ),
    "another count than the attention's": ("[8][q:8*4 k:8*4 v:8*4]", {}, {"num_heads": 4}, "attention.num_heads=4"),
    "an attribute that is not there": ("[8][q:heads_of_q*4 k:8*4 v:8*4]", {}, {}, "got 'heads_of_q'"),
    "grouped queries by head": ("[head][q k v]", {"num_heads": 4, "num_kv_heads": 2}, {}, "in blocks of whole heads"),
    "no counts": ("[head][q k v]", {}, {}, "the head count of '0.mixed' must be known"),
    "parts that are not wanted": ("[8][a:8*4 b:8*4 c:8*4]", {}, {}, "holds one of fused_projections"),
    "parts that are not there": ("q k v", COUNTS | {"fused_projections": ("q", "x")}, {}, "got \\['x'\\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_order_that_does_not_fit_is_refused(name):
    order, counts, says, message = REFUSED[name]
    with pytest.raises(HoraError, match=message):
        hora_torch.plan(base(3 * HEADS * WIDTH, by_head, **says), told(order, **counts))


def test_an_order_for_a_class_that_is_known_is_refused():
    sizes = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**sizes, intermediate_size=8))
    with pytest.raises(HoraError, match=r"whose rows come as \[head\]\[q k v\]"):
        hora_torch.plan(model, HoraConfig(row_order={"query_key_value": "q k v"}))


def test_rows_without_heads_are_told_to_be_one_map_that_shares_nothing():
    rows, split, _, counts = TOLD["by head"]
    plan = hora_torch.plan(base(rows, split), told("everything:1", **counts))
    assert [(layer.name, layer.alone) for layer in plan.layers] == [("0.mixed", True)]
    assert str(plan.layers[0].shape["everything"]) == str(ProjectionShape(1, rows, 16))


def test_rows_may_be_told_together_and_as_one_of_several_numbers():
    rows, split, _, _ = TOLD["plain"]
    sizes = [HEADS * WIDTH, KV_HEADS * WIDTH]
    model = base(rows, split, sizes=sizes, n=HEADS)
    plan = hora_torch.plan(model, told(f"q:n/sizes.0 k:{KV_HEADS}/sizes.1 v:{KV_HEADS}/sizes.1"))
    assert str(plan.layers[0].shape) == str(hora_torch.plan(model, told("q k v", **GROUPED)).layers[0].shape)
    assert "attention.sizes.0=32" in plan.layers[0].sources["q"]
    with pytest.raises(HoraError, match=r"got 'sizes\.2'"):
        hora_torch.plan(model, told("q:n/sizes.2 k:4*4 v:4*4"))


def test_queries_cannot_be_told_away_by_another_name():
    sizes = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, intermediate_size=8))
    with pytest.raises(HoraError, match="num_attention_heads=2: correct one of them"):
        hora_torch.plan(model, HoraConfig(target_modules=["q_proj"], row_order={"q_proj": "everything:1"}))


def test_state_spaces_and_linear_attention_are_reported_and_adapted_where_they_are_named():
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 8, "n_groups": 2}
    model = tf.Mamba2ForCausalLM(tf.Mamba2Config(**sizes, state_size=6, expand=2))
    with pytest.raises(HoraError, match=r"'in_proj' of Mamba2Mixer holds x, b, c: add it to target_modules"):
        hora_torch.plan(model, HoraConfig(r=2))
    config = HoraConfig(r=2, target_modules=["in_proj"], fused_projections=("x", "b", "c"))
    (layer,) = hora_torch.plan(model, config).layers
    shapes = {p: (site.projection.num_heads, site.projection.head_dim) for p, site in layer.sites.items()}
    assert shapes == {"x": (4, 8), "b": (2, 6), "c": (2, 6)}
    rows = {p: str(site.layout.rows(site.weight_shape)) for p, site in layer.sites.items()}
    assert rows == {"x": "32:64", "b": "64:76", "c": "76:88"}
