"""Two small models that exist in both frameworks under the same names: a ViT with fused qkv, a LLaMA with GQA.

The torch side is timm's and transformers' own code. In float64 both sides lose their float32 islands (the softmax of
JAX's attention, the norms and rotary tables of LLaMA), which belong to the base and would hide what HoRA does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hora_bench.models import llama, vit
from hora_bench.models.checkpoint import assign, vit_config
from hora_jax import Target, presets
from timm.models.vision_transformer import VisionTransformer
from transformers import LlamaConfig as HuggingFaceConfig
from transformers import LlamaForCausalLM


@dataclass(frozen=True, slots=True)
class Model:
    """A model in both frameworks.

    Parameters
    ----------
    name
        For ids and messages.
    torch, jax
        Build it, in float32: a module with random weights, and the NNX model that holds the same ones.
    targets
        Of `hora_jax.make_plan`; torch finds its own.
    batch
        ``(inputs, labels)`` of a training step, the same for both frameworks.
    logits
        ``(model, inputs)`` of a torch model.
    """

    name: str
    torch: Callable[[], torch.nn.Module]
    jax: Callable[[torch.nn.Module], nnx.Module]
    targets: tuple[Target, ...]
    batch: Callable[[int], tuple[Any, Any]]
    logits: Callable[[Any, torch.Tensor], torch.Tensor]

    def __repr__(self) -> str:
        return self.name


def _seeded(build: Callable[[], torch.nn.Module]) -> Callable[[], torch.nn.Module]:
    def built() -> torch.nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            module = build()
            with torch.no_grad():
                for param in module.parameters():
                    noise = torch.randn_like(param)
                    param.copy_(noise * param.shape[-1] ** -0.5 if param.ndim > 1 else param + noise / 10)
            return module.eval()

    return built


def _vit() -> torch.nn.Module:
    return VisionTransformer(
        img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=4, mlp_ratio=2, num_classes=5, init_values=0.5
    )


def _jax_vit(module: torch.nn.Module) -> nnx.Module:
    return assign(nnx.eval_shape(lambda: vit.ViT(vit_config(module), rngs=nnx.Rngs(0))), _arrays(module))


def _images(step: int) -> tuple[Any, Any]:
    random = np.random.default_rng((7, step))
    return random.standard_normal((4, 8, 8, 3)), random.integers(0, 5, 4)


LLAMA = HuggingFaceConfig(
    vocab_size=29,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    attn_implementation="sdpa",
    use_cache=False,
)


def _jax_llama(module: torch.nn.Module) -> nnx.Module:
    config = llama.LlamaConfig.from_hf(LLAMA.to_dict())
    return assign(nnx.eval_shape(lambda: llama.Llama(config, rngs=nnx.Rngs(0))), _arrays(module))


def _tokens(step: int) -> tuple[Any, Any]:
    tokens = np.random.default_rng((7, step)).integers(0, 29, (3, 9))
    return tokens[:, :-1], tokens[:, 1:]


MODELS = (
    Model(
        "vit",
        _seeded(_vit),
        _jax_vit,
        presets.vit(),
        _images,
        lambda model, images: model(images.permute(0, 3, 1, 2)),
    ),
    Model(
        "llama",
        _seeded(lambda: LlamaForCausalLM(LLAMA)),
        _jax_llama,
        presets.llama(),
        _tokens,
        lambda model, tokens: model(input_ids=tokens).logits,
    ),
)


def _arrays(module: torch.nn.Module) -> dict[str, Any]:
    return {name: value.numpy().copy() for name, value in module.state_dict().items()}


# float64 without float32 islands


class _Rotary(torch.nn.Module):
    """Rotary tables in the dtype of the activations."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dim = LLAMA.head_dim
        frequency = LLAMA.rope_parameters["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=x.dtype) / dim)
        angle = (position_ids[..., None] * frequency).repeat(1, 1, 2)
        return angle.cos(), angle.sin()


def widen_torch(module: torch.nn.Module) -> torch.nn.Module:
    """The module in float64 throughout."""
    for owner in list(module.modules()):
        for name, child in owner.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(owner, name, norm)
            elif type(child).__name__ == "LlamaRotaryEmbedding":
                setattr(owner, name, _Rotary())
    return module.double()


def widen_jax(module: nnx.Module, monkeypatch: pytest.MonkeyPatch) -> nnx.Module:
    """The model in float64 throughout, for as long as the patches last."""
    monkeypatch.setattr(jax.nn, "dot_product_attention", _attention)
    monkeypatch.setattr(llama, "rotary", _rotary)
    for _, inner in nnx.iter_modules(module):
        if isinstance(inner, nnx.Embed):
            inner.dtype = jnp.float64
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), module)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    k, v = (jnp.repeat(part, q.shape[2] // part.shape[2], axis=2) for part in (k, v))
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k) / jnp.sqrt(jnp.asarray(q.shape[-1], q.dtype))
    scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
    return jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(scores), v)


def _rotary(config: llama.LlamaConfig, positions: jax.Array) -> llama.Rotary:
    frequency = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    angle = jnp.tile(positions[..., None] * frequency, 2)
    return llama.Rotary(jnp.cos(angle), jnp.sin(angle))
