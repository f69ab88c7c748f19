"""The LLaMA family in Flax NNX, with the module names of Hugging Face transformers.

``model.layers.0.self_attn.q_proj.kernel`` here is ``model.layers.0.self_attn.q_proj.weight`` there, transposed.
Covers grouped-query attention, any rotary base, LLaMA 3 frequency scaling and tied embeddings: LLaMA 1 to 3,
SmolLM2, TinyLlama and their like.
"""

from dataclasses import dataclass, replace
from math import pi
from typing import Any, Final, NamedTuple, Self, final

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from hora_spec import HoraError
from jaxtyping import Array, Bool, Float, Int

from hora_bench.models.stack import make_layers, run_layers

INIT: Final = nnx.initializers.normal(0.02)


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """LLaMA 3's rescaling of the slow rotary frequencies (`rope_type` ``"llama3"``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Shape of a LLaMA; field names are those of `transformers.LlamaConfig`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Scaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    scan_layers: bool = False
    remat: bool = False

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """Read a Hugging Face ``config.json`` (both its old and its new place for rotary settings).

        Raises
        ------
        HoraError
            The file describes another architecture or an unknown rotary scaling.
        """
        if config.get("model_type") != "llama":
            raise HoraError(f"model_type must be 'llama' on JAX, got {config.get('model_type')!r}: use --backend torch")
        if config.get("hidden_act", "silu") != "silu":
            raise HoraError(f"hidden_act must be 'silu' on JAX, got {config['hidden_act']!r}: use --backend torch")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise HoraError(f"rotary scaling must be 'default' or 'llama3', got {kind!r}: use --backend torch")
        heads = config["num_attention_heads"]
        return cls(
            **{name: config[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
            rope_scaling=Llama3Scaling(**{f: rope[f] for f in Llama3Scaling.__slots__}) if kind == "llama3" else None,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            attention_bias=config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
        )

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return replace(self, **changes)


class Cache(NamedTuple):
    """Keys and values seen so far, for all layers, and how many positions are filled."""

    k: Float[Array, "layers batch length kv_heads head_dim"]
    v: Float[Array, "layers batch length kv_heads head_dim"]
    filled: Int[Array, ""]


class Rotary(NamedTuple):
    """Cosines and sines of the rotation of every position."""

    cos: Float[Array, "batch seq head_dim"]
    sin: Float[Array, "batch seq head_dim"]


def rotary(config: LlamaConfig, positions: Int[Array, "batch seq"]) -> Rotary:
    """Rotary tables: frequency ``theta^(-2i / head_dim)``, the two halves of a head rotated together."""
    frequency = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)  # once, in float64
    if (scaling := config.rope_scaling) is not None:
        turns = scaling.original_max_position_embeddings * frequency / (2 * pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = frequency * (keep + (1.0 - keep) / scaling.factor)
    angle = positions[..., None] * frequency
    angle = jnp.concatenate([angle, angle], axis=-1)
    return Rotary(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Float[Array, "batch seq heads head_dim"], table: Rotary) -> Float[Array, "batch seq heads head_dim"]:
    """Turn each pair ``(i, i + head_dim / 2)`` of a head by its position's angle."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    cos, sin = (part[:, :, None].astype(x.dtype) for part in table)
    return x * cos + turned * sin


@final
class Attention(nnx.Module):
    """Grouped-query attention; `cache` holds this layer's `(k, v)` and the write position."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        width, dim = config.hidden_size, config.head_dim
        bias = config.attention_bias
        self.q_proj = _linear(width, config.num_attention_heads * dim, bias, rngs)
        self.k_proj = _linear(width, config.num_key_value_heads * dim, bias, rngs)
        self.v_proj = _linear(width, config.num_key_value_heads * dim, bias, rngs)
        self.o_proj = _linear(config.num_attention_heads * dim, width, bias, rngs)

    def __call__(self, x: jax.Array, table: Rotary, mask: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Attended tokens and this layer's new cache."""
        q, k, v = (
            rearrange(project(x), "b s (h k) -> b s h k", k=self.config.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, table), rotate(k, table)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache.k, k.astype(cache.k.dtype), cache.filled, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache.v, v.astype(cache.v.dtype), cache.filled, axis=1)
            cache = Cache(k, v, cache.filled + x.shape[1])
        out = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return self.o_proj(rearrange(out, "b s h k -> b s (h k)")), cache


@final
class Mlp(nnx.Module):
    """SwiGLU: ``down(silu(gate x) * up x)``."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        width, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = _linear(width, hidden, bias, rngs)
        self.up_proj = _linear(width, hidden, bias, rngs)
        self.down_proj = _linear(hidden, width, bias, rngs)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        """Mixed channels."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


@final
class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        self.input_layernorm = _rms_norm(config, rngs)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = _rms_norm(config, rngs)
        self.mlp = Mlp(config, rngs)

    def __call__(self, x: jax.Array, table: Rotary, mask: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Next activations and this layer's new cache."""
        attended, cache = self.self_attn(self.input_layernorm(x), table, mask, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


@final
class Decoder(nnx.Module):
    """Embedding, decoder layers and final norm (`model` in a checkpoint's names)."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, embedding_init=INIT, rngs=rngs)
        self.layers = make_layers(
            lambda rngs: DecoderLayer(config, rngs), config.num_hidden_layers, scan=config.scan_layers, rngs=rngs
        )
        self.norm = _rms_norm(config, rngs)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, mask: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """Normalised hidden states and the new cache."""
        config = self.config
        if cache is not None:
            cache = cache._replace(filled=jnp.broadcast_to(cache.filled, (config.num_hidden_layers,)))
        x = self.embed_tokens.embedding[...][tokens]  # calling nnx.Embed 0.12 would keep the dtype it was made with
        x, cache = run_layers(self.layers, x, rotary(config, positions), mask, cache=cache, remat=config.remat)
        return self.norm(x), cache if cache is None else cache._replace(filled=cache.filled[0])


@final
class Llama(nnx.Module):
    """Causal language model: tokens ``(batch, seq)`` to logits ``(batch, seq, vocab_size)``.

    Parameters
    ----------
    config
        Its shape.
    rngs
        Random streams of the initial values.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.model = Decoder(config, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = _linear(config.hidden_size, config.vocab_size, False, rngs)

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        valid: Bool[Array, "batch keys"] | None = None,
        cache: Cache | None = None,
        at: Int[Array, "batch picked"] | None = None,
    ) -> Any:
        """Logits of the next token.

        Parameters
        ----------
        tokens
            Token ids; with a cache, the ids that follow what the cache holds.
        valid
            False where a key is padding: the same width as `tokens`, or as the cache's length. Positions are
            counted over valid keys, so padding on the left shifts nothing.
        cache
            From `init_cache`, or returned by the previous call.
        at
            Positions whose logits are wanted; default all. Few positions save most of the memory of a large vocabulary.

        Returns
        -------
        array, or (array, Cache)
            Logits ``(batch, seq or picked, vocab_size)``; with a cache also the cache to pass next.
        """
        batch, seq = tokens.shape
        start, keys = (0, seq) if cache is None else (cache.filled, cache.k.shape[2])
        valid = jnp.ones((batch, keys), bool) if valid is None else valid
        slots = start + jnp.arange(seq)
        positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        positions = jax.lax.dynamic_slice_in_dim(positions, start, seq, axis=1)
        causal = slots[:, None] >= jnp.arange(keys)[None, :]
        mask = causal[None, None] & valid[:, None, None, :]
        hidden, new = self.model(tokens, positions, mask, cache)
        if at is not None:
            hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
        tied = self.config.tie_word_embeddings
        logits = hidden @ self.model.embed_tokens.embedding[...].T if tied else self.lm_head(hidden)
        return logits if cache is None else (logits, new)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `length` positions, of the weights' dtype."""
        c, dtype = self.config, self.model.embed_tokens.embedding.dtype
        shape = (c.num_hidden_layers, batch, length, c.num_key_value_heads, c.head_dim)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))


def _linear(inputs: int, outputs: int, bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=INIT, rngs=rngs)


def _rms_norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
