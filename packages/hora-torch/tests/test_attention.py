"""``nn.MultiheadAttention``: query, key and value each get their own update, told from the equations alone."""

import contextlib
import copy

import peft
import pytest
import torch
from hora_spec import HoraError, LayerShape, ProjectionShape, reference
from hora_torch import HoraConfig
from torch import nn

from .oracle import differ, parameters

EMBED, HEADS = 8, 2
SIZES = BATCH, QUERIES, KEYS = 3, 6, 5
PARTS = [("q",), ("k",), ("v",), ("q", "v"), ("q", "k", "v")]


class Attention(nn.Module):
    """One attention, asked with three inputs or with one."""

    def __init__(self, kdim=None, vdim=None):
        super().__init__()
        self.attention = nn.MultiheadAttention(EMBED, HEADS, kdim=kdim, vdim=vdim, batch_first=True)

    def forward(self, *inputs):
        query, key, value = inputs if len(inputs) == 3 else inputs * 3
        return self.attention(query, key, value, need_weights=False)[0]


def build(**kwargs):
    """The same weights at every call, with biases that are not zero."""
    torch.manual_seed(0)
    model = Attention(**kwargs)
    for param in model.parameters():
        nn.init.normal_(param, std=0.5)
    return model.eval()


def adapt(model, parts, **kwargs):
    config = HoraConfig(
        r=2,
        hidden_dim=6,
        head_embed_dim=5,
        target_modules=["attention"],
        fused_projections=parts,
        init_weights=False,
        hora_alpha=1.0,
        **kwargs,
    )
    return peft.get_peft_model(model, config).eval()


def by_hand(base, model, parts, inputs):
    """Softmax attention in float64 on projections that are multiplied, cut into heads and joined one by one."""
    widths = {"q": EMBED, "k": base.kdim, "v": base.vdim}
    layer = LayerShape({p: ProjectionShape(HEADS, EMBED // HEADS, widths[p]) for p in parts})
    params = {
        key.partition(".hora_hyper.")[2]: value.detach().double().numpy() for key, value in parameters(model).items()
    }
    updates = reference.delta(model.peft_config["default"].spec(), layer, params)
    projected = {}
    for index, (p, x) in enumerate(zip("qkv", inputs, strict=True)):
        rows = slice(EMBED * index, EMBED * (index + 1))
        weight = getattr(base, f"{p}_proj_weight")
        weight = (base.in_proj_weight[rows] if weight is None else weight).detach().double()
        update = torch.from_numpy(updates[p]) if p in parts else 0
        projected[p] = x.double() @ (weight + update).T + base.in_proj_bias[rows].double()
    heads = []
    for head in range(HEADS):
        own = slice(head * EMBED // HEADS, (head + 1) * EMBED // HEADS)
        q, k, v = (projected[p][..., own] for p in "qkv")
        heads.append((q @ k.mT / (EMBED // HEADS) ** 0.5).softmax(-1) @ v)
    out = base.out_proj
    return torch.cat(heads, -1) @ out.weight.double().T + out.bias.double()


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", PARTS, ids="".join)
def test_self_attention_adds_each_update_to_its_own_projection(parts):
    x, model = noise(3, 5, EMBED), adapt(build(), parts)
    base = build()
    with torch.no_grad():
        expected = by_hand(base.attention, model, parts, (x, x, x))
        close(model(x), expected)
        close(model.merge_and_unload()(x), expected)
        differ(expected.float(), base(x))


@pytest.mark.parametrize("parts", PARTS, ids="".join)
@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 7}], ids=["one weight", "three weights"])
def test_cross_attention_adds_each_update_to_its_own_projection(parts, widths):
    model, base = adapt(build(**widths), parts), build(**widths)
    inputs = noise(3, 5, EMBED), noise(3, 4, base.attention.kdim), noise(3, 4, base.attention.vdim)
    with torch.no_grad():
        expected = by_hand(base.attention, model, parts, inputs)
        close(model(*inputs), expected)
        close(model.merge_and_unload()(*inputs), expected)
        differ(expected.float(), base(*inputs))


@pytest.mark.parametrize("part", "qkv")
def test_merging_changes_the_rows_of_the_adapted_projection_alone(part):
    model, before = adapt(build(), (part,)), build().attention.in_proj_weight
    merged = model.merge_and_unload().attention.in_proj_weight
    changed = (merged != before).any(1).reshape(3, EMBED)
    assert changed.any(1).tolist() == [part == other for other in "qkv"]


def masks(batch, queries, keys):
    """Arguments that mask: each form that torch takes, alone and together, the first key always seen."""
    shape = (queries, keys)
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.4
    seen[:, 0] = False
    per_head = seen.expand(batch * HEADS, *shape).clone()
    per_head[0, :, 1] = True
    padding = torch.zeros(batch, keys, dtype=torch.bool)
    padding[-1, keys - 1] = True
    added = torch.zeros(padding.shape).masked_fill(padding, -1.0)
    return [
        {},
        {"attn_mask": seen},
        {"attn_mask": torch.ones(shape, dtype=torch.bool).triu(1), "is_causal": True},
        {"attn_mask": seen, "is_causal": True},  # a hint that is wrong is believed alike
        {"attn_mask": noise(*shape)},
        {"attn_mask": per_head},
        {"key_padding_mask": padding},
        {"key_padding_mask": added, "attn_mask": noise(*shape)},
        {"key_padding_mask": padding, "attn_mask": per_head},
    ]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 6, "vdim": 7, "add_bias_kv": True}],
    ids=str,
)
def test_every_way_to_call_an_attention_is_that_of_its_merged_base(options, batch_first, grad):
    torch.manual_seed(0)
    base = nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first, **options)
    model = adapt(nn.ModuleDict({"attention": copy.deepcopy(base)}), ("q", "k", "v"))
    adapted = model.base_model.model.attention
    merged = copy.deepcopy(model).merge_and_unload().attention
    widths = EMBED, options.get("kdim", EMBED), options.get("vdim", EMBED)
    inputs = [noise(BATCH, length, width) for length, width in zip((QUERIES, KEYS, KEYS), widths, strict=True)]
    batched = inputs if batch_first else [x.transpose(0, 1) for x in inputs]
    calls = [(batched, mask) for mask in masks(*SIZES)]
    for mask in masks(1, QUERIES, KEYS):
        alone = {name: value[0] if name == "key_padding_mask" else value for name, value in mask.items()}
        calls.append(([x[0] for x in inputs], alone))
    for args, mask in calls:
        for weights in {}, {"need_weights": False}, {"average_attn_weights": False}:
            with torch.set_grad_enabled(grad):
                actual, expected = (module(*args, **mask, **weights) for module in (adapted, merged))
                torch.testing.assert_close(actual, expected)
                with model.disable_adapter():
                    torch.testing.assert_close(adapted(*args, **mask, **weights), base(*args, **mask, **weights))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("same", ["", "qk", "kv", "qv", "qkv"])
def test_inputs_that_are_one_tensor_are_those_that_are_equal(same, batch_first):
    """As in self-attention, and in cross-attention, whose keys and values are one."""
    base = nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first)
    attention = adapt(nn.ModuleDict({"attention": base}), ("q", "k", "v")).base_model.model.attention
    whole = noise(4, BATCH, KEYS, EMBED)
    inputs = [whole[0 if part in same else i] for i, part in enumerate("qkv", 1)]
    one = [inputs["qkv".index(same[0])] if part in same else x for part, x in zip("qkv", inputs, strict=True)]
    torch.testing.assert_close(attention(*one), attention(*(x.clone() for x in inputs)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_each_sample_has_its_adapter():
    model = adapt(build(), ("q", "v"))
    torch.manual_seed(1)
    model.add_adapter("other", HoraConfig(r=1, target_modules=["attention"], init_weights=False))
    attention, x = model.base_model.model.attention, noise(3, 4, EMBED)
    names = ["other", "default", "__base__"]
    expected = []
    for name, row in zip(names, x, strict=True):
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            expected.append(attention(row, row, row)[0])
    with torch.no_grad():
        assert len({tuple(row.flatten().tolist()) for row in expected}) == 3
        together, _ = attention(x, x, x, adapter_names=names)
        rows = torch.nested.nested_tensor([*x])
        nested, _ = attention(rows, rows, rows, need_weights=False, adapter_names=names)
    torch.testing.assert_close(together, torch.stack(expected))
    torch.testing.assert_close(torch.stack(nested.unbind()), torch.stack(expected))
    with model.disable_adapter():
        torch.testing.assert_close(attention(x, x, x, adapter_names=names), attention.base_layer(x, x, x))


def test_what_surrounds_an_attention_reads_its_base_but_takes_no_way_past_its_adapters():
    model = adapt(build(), ("q",))
    attention = model.base_model.model.attention
    assert (attention.num_heads, attention._qkv_same_embed_dim) == (HEADS, False)
    with model.disable_adapter():
        assert attention._qkv_same_embed_dim
    attention.merge()
    assert attention._qkv_same_embed_dim
    bare = type(attention).__new__(type(attention))
    assert not hasattr(bare, "base_layer")
    assert not hasattr(bare, "hora_hyper")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "asked",
    [{"need_weights": True}, {"attn_mask": torch.zeros(3, 3)}, {"key_padding_mask": torch.zeros(2, 3)}, {"key": None}],
    ids=lambda asked: next(iter(asked)),
)
def test_what_nested_tensors_cannot_do_is_refused(asked):
    attention = adapt(build(), ("q",)).base_model.model.attention
    nested = torch.nested.nested_tensor([noise(3, EMBED), noise(2, EMBED)])
    inputs = {"query": nested, "key": nested, "value": nested, "need_weights": False}
    assert attention(**inputs)[0].is_nested
    asked = {"key": nested.clone()} if "key" in asked else asked
    with pytest.raises(HoraError, match="self-attention alone"):
        attention(**inputs | asked)


def test_a_causal_hint_without_a_mask_is_refused():
    attention = adapt(build(), ("q",)).base_model.model.attention
    with pytest.raises(HoraError, match="pass attn_mask too"):
        attention(*[noise(1, 3, EMBED)] * 3, is_causal=True)


@pytest.mark.parametrize("base", ["attention", "attention.out_proj"])
def test_a_hook_on_what_is_computed_past_it_is_refused(base):
    model = build()
    attention = adapt(model, ("q",)).base_model.model.attention
    attention.get_submodule("base_layer" + base.removeprefix("attention")).register_forward_hook(print)
    with pytest.raises(HoraError, match="got hooks"):
        attention(*[noise(1, 3, EMBED)] * 3)


def test_dropout_of_inputs_averages_to_the_branch_and_of_weights_to_the_attention():
    torch.manual_seed(0)
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(EMBED, HEADS, dropout=0.3, batch_first=True)})
    model = adapt(base, ("v",), hora_dropout=0.4)
    attention, x = model.base_model.model.attention, noise(1, 3, EMBED).expand(20000, -1, -1)
    with torch.no_grad():
        for weights in False, True:
            expected = attention.eval()(x[:1], x[:1], x[:1], need_weights=weights)[0]
            drawn = attention.train()(x, x, x, need_weights=weights)[0]
            assert drawn.std(0).min() > 0.05
            torch.testing.assert_close(drawn.mean(0, keepdim=True), expected, rtol=0, atol=0.02)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_transformer_encoder_takes_padded_batches():
    """In evaluation it passes nested tensors to its layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 6, 32), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    model = peft.get_peft_model(base, HoraConfig(r=2, init_weights=False)).eval()
    with torch.no_grad():
        nested = model(x, src_key_padding_mask=padding)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            plain = model(x, src_key_padding_mask=padding)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(nested[~padding], plain[~padding], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_gradients_pass_through_padded_batches():
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    model = peft.get_peft_model(nn.TransformerEncoder(layer, 1).eval(), HoraConfig(r=2, init_weights=False)).eval()
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    model(torch.randn(2, 6, 32), src_key_padding_mask=padding).square().sum().backward()
    assert all(param.grad is not None for param in model.parameters() if param.requires_grad)
