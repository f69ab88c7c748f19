"""The order of fused rows: what the table says is what the attention computes."""

import copy
import importlib
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
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
    "timm-tnt": ("qk", "q k", 4, lambda: timm("models.tnt.Attention", EMBED, EMBED, HEADS)),
    "diffusers": ("to_qkv", "q k v", 4, diffusers),
}

OTHER: dict[str, tuple[str, str, Callable[[], tuple[nn.Module, Call]]]] = {
    "falcon-rw": ("query_key_value", "[head][q k v]", lambda: falcon(multi_query=False)),
    "falcon-40b": ("query_key_value", "[kv head][q.. k v]", lambda: falcon(new_decoder_architecture=True)),
    "gpt_bigcode": ("c_attn", "[head][q k v]", lambda: big_code(multi_query=False)),
    "timm-maxvit": ("qkv", "[head][q k v]", lambda: timm("models.maxxvit.AttentionCl", EMBED, dim_head=HEAD_DIM)),
    "timm-tiny_vit": ("qkv", "[head][q k v]", lambda: timm("models.tiny_vit.Attention", EMBED, HEAD_DIM, HEADS)),
    "timm-efficientformer": (
        "qkv",
        "[head][q k v]",
        lambda: timm("models.efficientformer.Attention", EMBED, HEAD_DIM, HEADS),
    ),
}


def parameter_rows(module: nn.Module, rows: slice) -> list[Tensor]:
    weight = module.weight[:, rows] if isinstance(module, Conv1D) else module.weight[rows]
    return [weight] if module.bias is None else [weight, module.bias[rows]]


def scaled(attention: nn.Module, call: Call, own: str, *changes: tuple[slice, float]) -> Tensor:
    """Output with some rows of a fused projection multiplied."""
    attention = copy.deepcopy(attention)
    with torch.no_grad():
        for rows, factor in changes:
            for values in parameter_rows(attention.get_submodule(own), rows):
                values.mul_(factor)
        return call(attention)


@pytest.mark.parametrize("name", PLAIN)
def test_rows_said_to_be_q_and_k_of_one_head_cancel_when_scaled_against_each_other(name):
    own, expected, kv_heads, build = PLAIN[name]
    torch.manual_seed(0)
    attention, call = build()
    attention.eval()
    for param in attention.parameters():
        nn.init.normal_(param, std=0.3)
    assert row_order(attention, own) == expected

    rows = {part: (HEADS if part == "q" else kv_heads) * HEAD_DIM for part in expected.split()}
    assert sum(rows.values()) == len(parameter_rows(attention.get_submodule(own), slice(None))[-1])
    base, group = scaled(attention, call, own), HEADS // kv_heads
    for head in range(kv_heads):
        k_start = rows.get("q", 0) + head * HEAD_DIM
        k = slice(k_start, k_start + HEAD_DIM)
        assert not torch.allclose(scaled(attention, call, own, (k, 0.5)), base, atol=1e-3), "k is used"
        if "q" in rows:
            q = slice(head * group * HEAD_DIM, (head + 1) * group * HEAD_DIM)
            moved = slice(q.start + HEAD_DIM // 2, q.stop + HEAD_DIM // 2)
            torch.testing.assert_close(scaled(attention, call, own, (q, 2.0), (k, 0.5)), base, atol=1e-5, rtol=1e-4)
            assert not torch.allclose(scaled(attention, call, own, (moved, 2.0), (k, 0.5)), base, atol=1e-3)


@pytest.mark.parametrize("name", OTHER)
def test_another_order_is_told_apart_by_a_bracket(name):
    own, expected, build = OTHER[name]
    assert row_order(build()[0], own) == expected
    assert "[" in expected


def test_orders_are_parts_of_q_k_v_or_bear_a_bracket():
    def resolved(order):
        return [leaf for branch in order[1:] for leaf in resolved(branch)] if isinstance(order, By) else [order]

    orders = {leaf for known in ROW_ORDER.values() for order in known.values() for leaf in resolved(order)}
    assert {order for order in orders if order and "[" not in order} == {"q k v", "k v", "q k"}


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
    assert row_order(cls.__new__(cls), "qkv") == order
