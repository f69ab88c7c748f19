"""Tiny models of every supported family, built from their configurations: no downloads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from hora_spec.testing.profiles import use_fast
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from . import launched  # noqa: F401, where torchvision is of another kind than torch

use_fast()

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


THIRD_PARTY = (
    # transformers 5.23 asks its own deprecated property while peft wraps a model
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # torch 2.13 traces an autograd function by instantiating it
    "ignore:.*should not be instantiated:DeprecationWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings are errors, but for these of others."""
    for item in items:
        for warning in THIRD_PARTY:
            item.add_marker(pytest.mark.filterwarnings(warning))


@dataclass(frozen=True)
class Family:
    """A model with random weights, an input for it, and what is adapted by default."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    modules: tuple[str, ...]
    """Last name components of the modules that are adapted without naming targets."""
    heads: dict[str, int]
    """Head count of each projection of the first layer."""

    def model(self) -> nn.Module:
        """The same weights at every call."""
        torch.manual_seed(0)
        return self.build().eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 64, shape or (2, 7), generator=torch.Generator().manual_seed(1))


def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def text() -> dict[str, Any]:
    return {"input_ids": ids()}


def image() -> dict[str, Any]:
    return {"pixel_values": pixels()}


def _gpt2(**kwargs: Any) -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16, **kwargs))


def _deepseek() -> nn.Module:
    latent = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
    sizes = TEXT | latent | {"first_k_dense_replace": 2, "num_key_value_heads": 4}
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**sizes))


def _clip() -> nn.Module:
    config = tf.CLIPConfig(
        text_config=TEXT | {"max_position_embeddings": 16, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2},
        vision_config=VISION,
        projection_dim=16,
    )
    return tf.CLIPModel(config)


def _t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=6,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
    )


def _timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5
    )


def _timm_eva(**kwargs: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    model = timm.models.eva.Eva(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5, **kwargs)
    for param in model.parameters():  # timm starts its output near zero, which would hide differences
        nn.init.normal_(param, std=0.2)
    return model


class Encoder(nn.Module):
    """``nn.TransformerEncoder``, self-attention by ``nn.MultiheadAttention``."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, **kwargs)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class Decoder(nn.Module):
    """``nn.TransformerDecoder``: self- and cross-attention, sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48, dropout=0.0), 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(len(x))
        return self.decoder(x, memory, tgt_mask=mask, tgt_is_causal=True)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


Q4V4 = {"q": 4, "v": 4}
FAMILIES: dict[str, Family] = {
    "llama": Family(
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, num_key_value_heads=2)),
        text,
        ("q_proj", "v_proj"),
        {"q": 4, "v": 2},
    ),
    "mistral": Family(
        lambda: tf.MistralForCausalLM(tf.MistralConfig(**TEXT, num_key_value_heads=2, head_dim=6)),
        text,
        ("q_proj", "v_proj"),
        {"q": 4, "v": 2},
    ),
    "qwen2": Family(
        lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**TEXT, num_key_value_heads=2)),
        text,
        ("q_proj", "v_proj"),
        {"q": 4, "v": 2},
    ),
    "qwen3": Family(
        lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**TEXT, num_key_value_heads=2, head_dim=10)),
        text,
        ("q_proj", "v_proj"),
        {"q": 4, "v": 2},
    ),
    "gemma": Family(
        lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**TEXT, num_key_value_heads=1, head_dim=12)),
        text,
        ("q_proj", "v_proj"),
        {"q": 4, "v": 1},
    ),
    "phi3": Family(
        lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**TEXT, num_key_value_heads=2, pad_token_id=0)),
        text,
        ("qkv_proj",),
        {"q": 4, "v": 2},
    ),
    "gpt2": Family(_gpt2, text, ("c_attn",), Q4V4),
    "gpt-neox": Family(
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TEXT, rotary_pct=0.5)), text, ("query_key_value",), Q4V4
    ),
    "falcon-40b": Family(
        lambda: tf.FalconForCausalLM(tf.FalconConfig(**TEXT, new_decoder_architecture=True, num_kv_heads=2)),
        text,
        ("query_key_value",),
        {"q": 4, "v": 2},
    ),
    "deepseek-v3": Family(_deepseek, text, ("q_b_proj", "kv_b_proj"), Q4V4),
    "gpt2-cross": Family(
        lambda: _gpt2(add_cross_attention=True),
        lambda: text() | {"encoder_hidden_states": noise(2, 5, 32)},
        ("c_attn", "q_attn"),
        Q4V4,
    ),
    "bert": Family(lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT)), text, ("query", "value"), Q4V4),
    "t5": Family(_t5, lambda: {"input_ids": ids(), "decoder_input_ids": ids(2, 4)}, ("q", "v"), Q4V4),
    "clip": Family(_clip, lambda: text() | image(), ("q_proj", "v_proj"), Q4V4),
    "vit": Family(lambda: tf.ViTForImageClassification(tf.ViTConfig(**VISION)), image, ("q_proj", "v_proj"), Q4V4),
    "dinov2": Family(
        lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**VISION)), image, ("q_proj", "v_proj"), Q4V4
    ),
    "timm-vit": Family(_timm_vit, lambda: {"x": pixels()}, ("qkv",), Q4V4),
    "timm-eva": Family(_timm_eva, lambda: {"x": pixels()}, ("qkv",), Q4V4),
    "timm-eva-separate": Family(
        lambda: _timm_eva(qkv_fused=False), lambda: {"x": pixels()}, ("q_proj", "v_proj"), Q4V4
    ),
    "mha": Family(lambda: Encoder(batch_first=True), lambda: {"x": noise(2, 6, 32)}, ("self_attn",), Q4V4),
    "mha-cross": Family(
        Decoder, lambda: {"x": noise(6, 2, 32), "memory": noise(5, 2, 32)}, ("self_attn", "multihead_attn"), Q4V4
    ),
}


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    """Every supported family, one at a time."""
    return FAMILIES[request.param]


@pytest.fixture
def families() -> dict[str, Family]:
    """All supported families by name."""
    return FAMILIES


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    store = distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()
