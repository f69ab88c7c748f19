"""Transformers as far as cost sees them: widths, heads and layers, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from hora_spec import LayerShape


class Workload(NamedTuple):
    """Sequences of equal length that pass a model together."""

    batch: int
    seq: int

    @property
    def tokens(self) -> int:
        """Tokens in all sequences."""
        return self.batch * self.seq


@dataclass(frozen=True, slots=True)
class Transformer:
    """A pre-norm transformer; adapters sit on Q and V of every layer.

    Attributes
    ----------
    embed_dim, num_layers, num_heads, num_kv_heads, mlp_dim
        Widths and counts; heads are ``embed_dim / num_heads`` wide.
    vocab_size
        Of a language model (gated MLP, RMS norms, no biases, untied head); 0 for a vision model (biases, layer
        norms, no head).
    patch_dim, image_tokens
        Of a vision model: values of one patch, and patches plus class token.
    workloads
        Sequences at which costs are given.
    rank
        Rank at which costs are given unless asked otherwise.
    """

    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    workloads: tuple[Workload, ...]
    rank: int
    vocab_size: int = 0
    patch_dim: int = 0
    image_tokens: int = 0

    @property
    def layer(self) -> LayerShape:
        """Adapted projections of one layer."""
        return LayerShape.attention(self.embed_dim, self.num_heads, num_kv_heads=self.num_kv_heads)

    @property
    def kv_dim(self) -> int:
        """Output rows of K, and of V."""
        return self.embed_dim // self.num_heads * self.num_kv_heads

    @property
    def layer_weights(self) -> int:
        """Entries of a layer's weight matrices, which are its MACs per token: Q, K, V, O and the MLP."""
        attention = 2 * self.embed_dim * (self.embed_dim + self.kv_dim)
        return attention + (3 if self.vocab_size else 2) * self.embed_dim * self.mlp_dim

    @property
    def params_count(self) -> int:
        """All parameters of the frozen model."""
        d, tables = self.embed_dim, 2 * self.vocab_size * self.embed_dim
        if self.vocab_size:
            return tables + self.num_layers * (self.layer_weights + 2 * d) + d
        biases_and_norms = 4 * d + self.mlp_dim + d + 4 * d
        patches = (self.patch_dim + 1) * d + d + self.image_tokens * d
        return patches + self.num_layers * (self.layer_weights + biases_and_norms) + 2 * d

    def forward_macs(self, load: Workload) -> int:
        """MACs of a forward pass: weight matrices, and both products of full (not causal) attention."""
        ends = self.vocab_size * self.embed_dim * load.tokens
        if not self.vocab_size:
            ends = load.batch * (self.image_tokens - 1) * self.patch_dim * self.embed_dim
        return ends + self.num_layers * (self.layer_weights * load.tokens + self._attention(load))

    def backward_macs(self, load: Workload) -> int:
        """MACs of the backward pass through the frozen model, as automatic differentiation does it.

        Frozen weights ask for gradients of activations alone. Below the first adapted projections nothing asks for
        any: not the patch embedding, nor the inputs of Q, K and V in the first layer, nor K's output there.
        """
        head = self.vocab_size * self.embed_dim * load.tokens
        inputs = self.embed_dim * (self.embed_dim + 2 * self.kv_dim) * load.tokens
        layers = self.num_layers * (self.layer_weights * load.tokens + 2 * self._attention(load))
        return head + layers - inputs - self._attention(load) // 2

    def _attention(self, load: Workload) -> int:
        """MACs of the scores and of the weighted sum of one layer."""
        return 2 * load.tokens * load.seq * self.embed_dim


_TEXT: Final = (Workload(1, 1), Workload(1, 256), Workload(1, 2048), Workload(8, 2048))
_IMAGES: Final = (Workload(1, 197), Workload(64, 197))


def _llama(embed_dim: int, num_layers: int, num_heads: int, mlp_dim: int, num_kv_heads: int = 0) -> Transformer:
    return Transformer(
        embed_dim,
        num_layers,
        num_heads,
        num_kv_heads or num_heads,
        mlp_dim,
        workloads=_TEXT,
        rank=32,
        vocab_size=32_000,
    )


def _vit(embed_dim: int, num_layers: int, num_heads: int) -> Transformer:
    return Transformer(
        embed_dim,
        num_layers,
        num_heads,
        num_heads,
        4 * embed_dim,
        workloads=_IMAGES,
        rank=8,
        patch_dim=3 * 16 * 16,
        image_tokens=197,
    )


MODELS: Final[Mapping[str, Transformer]] = {
    "vit-b-16": _vit(768, 12, 12),
    "vit-l-16": _vit(1024, 24, 16),
    "llama-7b": _llama(4096, 32, 32, 11_008),
    "llama-13b": _llama(5120, 40, 40, 13_824),
    "llama-70b": _llama(8192, 80, 64, 28_672, num_kv_heads=8),
}
