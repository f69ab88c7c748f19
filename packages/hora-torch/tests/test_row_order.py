"""The order of fused rows: what the table says is what the attention computes."""

import copy
import importlib
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from hora_spec import HoraError, Window
from hora_torch import HoraConfig
from hora_torch.heads import Attention
from hora_torch.order import Order
from hora_torch.row_order import ROW_ORDER, By, row_order
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Call = Callable[[nn.Module], Tensor]

EMBED, HEADS, HEAD_DIM, TOKENS = 32, 4, 8, 6


def tokens(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, TOKENS, EMBED)), generator=torch.Generator().manual_seed(1))


def rotary() -> tuple[Tensor, Tensor]:
    half = torch.rand(2, 2, TOKENS, HEAD_DIM // 2, generator=torch.Generator().manual_seed(2))
    return tuple(half.repeat(1, 1, 1, 2))


def load(name: str) -> Any:
    module, _, cls = name.rpartition(".")
    return getattr(importlib.import_module(module), cls)


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def hugging_face(
    path: str, config: type, call: Callable[..., Any], settings: dict[str, Any] | None = None, **kwargs: Any
):
    """An attention module of transformers, and a call of it."""
    chosen = config(**(settings or {}))
    chosen._attn_implementation = "eager"
    return load(f"transformers.models.{path}")(chosen, **kwargs), lambda module: first(call(module))


TEXT = {"hidden_size": EMBED, "num_attention_heads": HEADS}
GPT2 = {"n_embd": EMBED, "n_head": HEADS, "n_positions": 16}
PHI3 = TEXT | {"num_key_value_heads": 2, "pad_token_id": 0}


def gpt2(cross: bool):
    inputs = {"encoder_hidden_states": tokens().flip(1), "encoder_attention_mask": torch.zeros(1)} if cross else {}
    return hugging_face(
        "gpt2.modeling_gpt2.GPT2Attention",
        tf.GPT2Config,
        lambda module: module(tokens(), **inputs),
        GPT2,
        is_cross_attention=cross,
        layer_idx=0,
    )


def falcon(**kwargs: bool):
    return hugging_face(
        "falcon.modeling_falcon.FalconAttention",
        tf.FalconConfig,
        lambda module: module(tokens(), None, torch.zeros(1), position_embeddings=rotary()),
        TEXT | kwargs,
        layer_idx=0,
    )


def big_code(multi_query: bool):
    return hugging_face(
        "gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeAttention",
        tf.GPTBigCodeConfig,
        lambda module: module(tokens()),
        GPT2 | {"multi_query": multi_query},
        layer_idx=0,
    )


def timm(path: str, *args: Any, inputs: tuple[Any, ...] = (), **kwargs: Any):
    pytest.importorskip("timm")
    return load(f"timm.{path}")(*args, **kwargs), lambda module: module(*(inputs or (tokens(),)))


def diffusers():
    processors = pytest.importorskip("diffusers.models.attention_processor")
    attention = processors.Attention(EMBED, heads=HEADS, dim_head=HEAD_DIM, bias=True)
    attention.fuse_projections()
    attention.set_processor(processors.FusedAttnProcessor2_0())
    return attention, lambda module: module(tokens())


PLAIN: dict[str, tuple[str, str, int, Callable[[], tuple[nn.Module, Call]]]] = {
    "gpt2": ("c_attn", "q k v", 4, lambda: gpt2(cross=False)),
    "gpt2-cross": ("c_attn", "k v", 4, lambda: gpt2(cross=True)),
    "gpt_bigcode": ("c_attn", "q k v", 1, lambda: big_code(multi_query=True)),
    "falcon-7b": ("query_key_value", "q k v", 1, lambda: falcon(multi_query=True)),
    "modernbert": (
        "Wqkv",
        "q k v",
        4,
        lambda: hugging_face(
            "modernbert.modeling_modernbert.ModernBertAttention",
            tf.ModernBertConfig,
            lambda module: module(tokens(), position_embeddings=rotary()),
            TEXT,
            layer_idx=0,
        ),
    ),
    "phi3": (
        "qkv_proj",
        "q k v",
        2,
        lambda: hugging_face(
            "phi3.modeling_phi3.Phi3Attention",
            tf.Phi3Config,
            lambda module: module(tokens(), position_embeddings=rotary(), attention_mask=None),
            PHI3,
            layer_idx=0,
        ),
    ),
    "blip": (
        "qkv",
        "q k v",
        4,
        lambda: hugging_face(
            "blip.modeling_blip.BlipAttention", tf.BlipVisionConfig, lambda module: module(tokens()), TEXT
        ),
    ),
    "timm-vit": ("qkv", "q k v", 4, lambda: timm("layers.attention.Attention", EMBED, HEADS)),
    "timm-pool": ("kv", "k v", 4, lambda: timm("layers.attention_pool.AttentionPoolLatent", EMBED, num_heads=HEADS)),
    "timm-swin": (
        "qkv",
        "q k v",
        4,
        lambda: timm(
            "models.swin_transformer.WindowAttention", EMBED, HEADS, window_size=2, inputs=(tokens(2, 4, EMBED),)
        ),
    ),
    "timm-gcvit-local": (
        "qkv",
        "q k v",
        4,
        lambda: timm("models.gcvit.WindowAttentionGlobal", EMBED, HEADS, (2, 3), use_global=False),
    ),
    "timm-gcvit-global": (
        "qkv",
        "k v",
        4,
        lambda: timm("models.gcvit.WindowAttentionGlobal", EMBED, HEADS, (2, 3), inputs=(tokens(), tokens().flip(1))),
    ),
    "timm-maxvit": (
        "qkv",
        "q k v",
        4,
        lambda: timm("models.maxxvit.AttentionCl", EMBED, dim_head=HEAD_DIM, head_first=False),
    ),
    "timm-visformer": (
        "qkv",
        "q k v",
        4,
        lambda: timm("models.visformer.Attention", EMBED, HEADS, inputs=(tokens(2, EMBED, 2, 3),)),
    ),
    "timm-tnt": ("qk", "q k", 4, lambda: timm("models.tnt.Attention", EMBED, EMBED, HEADS)),
    "diffusers": ("to_qkv", "q k v", 4, diffusers),
}


def gpt_neox():
    return hugging_face(
        "gpt_neox.modeling_gpt_neox.GPTNeoXAttention",
        tf.GPTNeoXConfig,
        lambda module: module(tokens(), attention_mask=None, position_embeddings=rotary()),
        TEXT,
        layer_idx=0,
    )


def codegen():
    attention, _ = hugging_face(
        "codegen.modeling_codegen.CodeGenAttention", tf.CodeGenConfig, lambda module: module, GPT2 | {"rotary_dim": 4}
    )
    positions = torch.arange(TOKENS)[None]
    return attention, lambda module: first(module(tokens(), position_ids=positions))


BESIDE = "mlp:1*in_split.0 q:num_heads/in_split.1 k:num_heads/in_split.2 v:num_heads/in_split.3"
UNEQUAL = "[num_heads][q:num_heads*key_dim k:num_heads*key_dim v:num_heads*val_dim]"
HEAD_BY_HEAD: dict[str, tuple[str, str, int, Callable[[], tuple[nn.Module, Call]]]] = {
    "gpt_neox": ("query_key_value", "[head][q k v]", 4, gpt_neox),
    "codegen": ("qkv_proj", "[4][q v k]", 4, codegen),
    "falcon-rw": ("query_key_value", "[head][q k v]", 4, lambda: falcon(multi_query=False)),
    "falcon-40b": (
        "query_key_value",
        "[group][q k v]",
        2,
        lambda: falcon(new_decoder_architecture=True, num_kv_heads=2),
    ),
    "gpt_bigcode": ("c_attn", "[head][q k v]", 4, lambda: big_code(multi_query=False)),
    "timm-maxvit": ("qkv", "[head][q k v]", 4, lambda: timm("models.maxxvit.AttentionCl", EMBED, dim_head=HEAD_DIM)),
    "timm-coatnet": (
        "qkv",
        "[head][q k v]",
        4,
        lambda: timm("models.maxxvit.Attention2d", EMBED, dim_head=HEAD_DIM, inputs=(tokens(2, EMBED, 2, 3),)),
    ),
    **{
        f"timm-{cls}": ("in_proj", BESIDE, 4, lambda cls=cls: timm(f"models.vision_transformer.{cls}", EMBED, HEADS))
        for cls in ("ParallelScalingBlock", "DiffParallelScalingBlock")
    },
    "timm-tiny_vit": (
        "qkv",
        UNEQUAL,
        4,
        lambda: timm("models.tiny_vit.Attention", EMBED, HEAD_DIM, HEADS, 2, resolution=(2, 3)),
    ),
    "timm-efficientformer": (
        "qkv",
        UNEQUAL,
        4,
        lambda: timm("models.efficientformer.Attention", EMBED, HEAD_DIM, HEADS, resolution=(2, 3)),
    ),
    "timm-levit": (
        "qkv.linear",
        UNEQUAL,
        4,
        lambda: timm("models.levit.Attention", EMBED, HEAD_DIM, HEADS, 3.0, resolution=(2, 3)),
    ),
}
ORDERS = {name: case for name, case in PLAIN.items() if name != "timm-maxvit"} | HEAD_BY_HEAD
ORDERS["timm-maxvit-plain"] = PLAIN["timm-maxvit"]


def heads_of(attention: nn.Module, own: str) -> dict[str, list[Any]]:
    """Rows of each head of each part, as they are adapted."""
    linear = attention.get_submodule(own)
    size = linear.weight.shape[1 if isinstance(linear, Conv1D) else 0]
    found = Attention(attention, "", {own: size}, None, HoraConfig()).rows(own)
    spans = {part.role: Window(0, part.start, part.stop, part.blocks).span(size) for part in found}
    return {part.role: list(spans[part.role].positions.reshape(part.heads, part.head_dim)) for part in found}


def scaled(attention: nn.Module, call: Call, own: str, *changes: tuple[Any, float]) -> Tensor:
    """Output with some rows of a fused projection multiplied."""
    attention = copy.deepcopy(attention)
    with torch.no_grad():
        for rows, factor in changes:
            linear = attention.get_submodule(own)
            (linear.weight.T if isinstance(linear, Conv1D) else linear.weight)[rows] *= factor
            if linear.bias is not None:
                linear.bias[rows] *= factor
        return call(attention)


@pytest.mark.parametrize("name", ORDERS)
def test_rows_said_to_be_q_and_k_of_one_head_cancel_when_scaled_against_each_other(name):
    own, expected, kv_heads, build = ORDERS[name]
    torch.manual_seed(0)
    attention, call = build()
    attention.eval()
    for param in attention.parameters():
        nn.init.normal_(param, std=0.3)
    for norm in attention.modules():
        if isinstance(norm, nn.BatchNorm1d):  # adds to what is scaled
            nn.init.zeros_(norm.bias)
    assert str(row_order(attention, own)) == expected

    heads = heads_of(attention, own)
    assert len(heads["k"]) == kv_heads
    base, group = scaled(attention, call, own), HEADS // kv_heads
    for head, k in enumerate(heads["k"]):
        assert not torch.allclose(scaled(attention, call, own, (k, 0.5)), base, atol=1e-3), "k is used"
        if "q" in heads:
            q = np.concatenate(heads["q"][head * group : (head + 1) * group])
            others = np.setdiff1d(np.concatenate(heads["q"]), q)
            torch.testing.assert_close(scaled(attention, call, own, (q, 2.0), (k, 0.5)), base, atol=1e-5, rtol=1e-4)
            assert not torch.allclose(scaled(attention, call, own, (others, 2.0), (k, 0.5)), base, atol=1e-3)
        if "v" in heads:
            doubled = scaled(attention, call, own, *((v[:1], 2.0) for v in heads["v"]))  # a norm may take out the whole
            assert not torch.allclose(doubled, base, atol=1e-3), "v is used"


def test_every_order_that_is_known_can_be_read():
    def resolved(order):
        return [leaf for branch in order[1:] for leaf in resolved(branch)] if isinstance(order, By) else [order]

    orders = {leaf for known in ROW_ORDER.values() for order in known.values() for leaf in resolved(order)}
    assert all(Order.parse(order) for order in orders - {None})
    assert len(orders) > 20


NO_ORDERS = [
    *("", "q q", "[head]", "[head][]", "q k v gate", "q k:4*8", "q:4*8 k", "[q k v]", "[head][q k v", "q-k", "v,k"),
    *("q:8/64*2", "q:2*4/8 k:2*4", "q:8/", "q:sizes.a*2 k:2*4"),
    *("q:0*4 k:8*4", "q:8*0 k:8*4", "q:0/32", "q:4/0 k:8*4", "[0][q k v]", "q:²*4"),
    *("q:", "[head] q k v", "[mlp][head][q k v]", "q:4 k:4", "q:*4", None, 3),
]


@pytest.mark.parametrize("text", NO_ORDERS)
def test_what_is_no_order_is_refused(text):
    with pytest.raises(HoraError, match="an order of rows names its parts"):
        Order.parse(text)


@pytest.mark.parametrize("package", ["transformers", "timm", "diffusers"])
def test_every_named_class_is_in_the_library(package):
    found = find_spec(package)
    if found is None:
        pytest.skip(f"needs {package}")
    root = Path(found.origin).parents[1]
    names = [
        name
        for name in ROW_ORDER
        if name.startswith(f"{package}.") and name != "timm.models.vision_transformer.Attention"
    ]
    assert names
    for name in names:
        module, _, cls = name.rpartition(".")
        source = (root / module.replace(".", "/")).with_suffix(".py").read_text()
        assert re.search(rf"^ *class {cls}[(:]", source, re.MULTILINE), name


class Blip(load("transformers.models.blip.modeling_blip.BlipAttention")):
    pass


class ShapedOtherwise(Blip):
    def _shape(self, tensor: Tensor, seq_len: int, bsz: int) -> Tensor:
        return tensor


class ComputedOtherwise(Blip):
    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x)


@pytest.mark.parametrize(
    ("cls", "order"), [(Blip, "q k v"), (ShapedOtherwise, None), (ComputedOtherwise, None), (nn.Linear, None)]
)
def test_a_subclass_keeps_the_order_until_it_changes_what_forward_may_call(cls, order):
    assert str(row_order(cls.__new__(cls), "qkv")) == str(order)


class Fusible(nn.Module):
    """As those of diffusers, which a method fuses after construction, whatever a subclass computes."""

    def fuse_projections(self) -> None:
        self.fused_projections = True

    def forward(self, x: Tensor) -> Tensor:
        return x


class FusedOtherwise(Fusible):
    def forward(self, x: Tensor) -> Tensor:
        return -x


def test_the_order_of_what_is_fused_later_is_that_of_the_class_that_fuses_it(monkeypatch):
    name = f"{Fusible.__module__}.Fusible"
    monkeypatch.setattr("hora_torch.row_order.ROW_ORDER", {name: {"to_kv": "k v"}})
    for module in (Fusible(), FusedOtherwise()):
        assert str(row_order(module, "to_kv")) == ("k v" if type(module) is Fusible else "None")
        module.fuse_projections()
        assert str(row_order(module, "to_kv")) == "k v"
        assert row_order(module, "to_qkv") is None
        module.forward = module.forward
        assert row_order(module, "to_kv") is None
        module._hf_hook = None
        assert str(row_order(module, "to_kv")) == "k v"
