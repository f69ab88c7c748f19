"""``nn.MultiheadAttention``: query, key and value each get their own update, told from the equations alone."""

import peft
import pytest
import torch
from hora_spec import LayerShape, ProjectionShape, reference
from hora_torch import HoraConfig
from torch import nn

from .oracle import differ, parameters

EMBED, HEADS = 8, 2
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


def adapt(model, parts):
    config = HoraConfig(
        r=2,
        hidden_dim=6,
        head_embed_dim=5,
        target_modules=["attention"],
        fused_projections=parts,
        init_weights=False,
        hora_alpha=1.0,
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
