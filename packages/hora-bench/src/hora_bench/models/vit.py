"""A vision transformer in Flax NNX whose modules carry timm's names.

``blocks.0.attn.qkv.kernel`` here is ``blocks.0.attn.qkv.weight`` there, transposed; so adapters, layer names
and checkpoints need no translation table.
"""

from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Self, final

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from hora_bench.models.stack import make_layers, run_layers

INIT: Final = nnx.initializers.truncated_normal(0.02)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTConfig:
    """Shape of a vision transformer; the defaults are ViT-B/16 at 224 pixels.

    Attributes
    ----------
    image_size, patch_size
        Height and width in pixels.
    embed_dim, depth, num_heads, mlp_dim
        Width of the residual stream, number of blocks, heads per block, hidden width of the MLP.
    num_classes
        Outputs of the head; 0 returns pooled features.
    layer_scale
        Learned per-channel scale on both branches of a block (DINOv2, CaiT).
    class_token, reg_tokens, pos_embed_prefix
        Prefix tokens, and whether the position table covers them.
    pool
        ``"token"`` reads the class token, ``"avg"`` averages the patch tokens.
    norm, fc_norm
        Final normalisation before and after pooling.
    norm_eps
        Epsilon of every LayerNorm.
    scan_layers, remat
        See `hora_bench.models.stack`.
    """

    image_size: int = 224
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    num_classes: int = 1000
    qkv_bias: bool = True
    layer_scale: bool = False
    class_token: bool = True
    reg_tokens: int = 0
    pos_embed_prefix: bool = True
    pool: Literal["token", "avg"] = "token"
    norm: bool = True
    fc_norm: bool = False
    norm_eps: float = 1e-6
    scan_layers: bool = False
    remat: bool = False

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Class token and registers."""
        return int(self.class_token) + self.reg_tokens

    @property
    def num_positions(self) -> int:
        """Rows of the position table."""
        return self.grid**2 + (self.num_prefix_tokens if self.pos_embed_prefix else 0)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return replace(self, **changes)


@final
class LayerScale(nnx.Module):
    """``x * gamma``, one gamma per channel."""

    def __init__(self, dim: int) -> None:
        self.gamma = nnx.Param(jnp.full((dim,), 1e-5))

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        """Scaled channels."""
        return x * self.gamma[...]


@final
class PatchEmbed(nnx.Module):
    """Non-overlapping patches, flattened ``(row, column, channel)`` and projected."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs) -> None:
        self.patch_size = config.patch_size
        inputs = 3 * config.patch_size**2
        self.proj = nnx.Linear(inputs, config.embed_dim, kernel_init=INIT, rngs=rngs)

    def __call__(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch patches embed"]:
        """Patch tokens, row by row."""
        p = self.patch_size
        return self.proj(rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p))


@final
class Attention(nnx.Module):
    """Multi-head self-attention with one fused ``qkv`` kernel ``(embed, 3 heads head_dim)``."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs) -> None:
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.head_dim = dim // config.num_heads
        self.qkv = nnx.Linear(dim, 3 * dim, use_bias=config.qkv_bias, kernel_init=INIT, rngs=rngs)
        self.proj = nnx.Linear(dim, dim, kernel_init=INIT, rngs=rngs)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        """Attended tokens."""
        q, k, v = rearrange(self.qkv(x), "b s (three h k) -> three b s h k", three=3, h=self.num_heads)
        return self.proj(rearrange(jax.nn.dot_product_attention(q, k, v), "b s h k -> b s (h k)"))


@final
class Mlp(nnx.Module):
    """Two linear maps around an exact GELU."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs) -> None:
        self.fc1 = nnx.Linear(config.embed_dim, config.mlp_dim, kernel_init=INIT, rngs=rngs)
        self.fc2 = nnx.Linear(config.mlp_dim, config.embed_dim, kernel_init=INIT, rngs=rngs)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        """Mixed channels."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


@final
class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs) -> None:
        self.norm1 = _layer_norm(config, rngs)
        self.attn = Attention(config, rngs)
        self.norm2 = _layer_norm(config, rngs)
        self.mlp = Mlp(config, rngs)
        if config.layer_scale:
            self.ls1, self.ls2 = LayerScale(config.embed_dim), LayerScale(config.embed_dim)
        self.layer_scale = config.layer_scale

    def __call__(
        self, x: Float[Array, "batch seq embed"], paths: Float[Array, "batch 2"] | None = None
    ) -> tuple[jax.Array, Any]:
        """Next activations, and `paths` as they came: factors of the two branches, 0 where one is left out."""
        attended = self.attn(self.norm1(x))
        x = x + _kept(self.ls1(attended) if self.layer_scale else attended, paths, 0)
        mixed = self.mlp(self.norm2(x))
        return x + _kept(self.ls2(mixed) if self.layer_scale else mixed, paths, 1), paths


@final
class ViT(nnx.Module):
    """Vision transformer: images ``(batch, height, width, 3)`` to logits ``(batch, num_classes)``.

    Parameters
    ----------
    config
        Its shape.
    rngs
        Random streams of the initial values.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(config, rngs)
        if config.class_token:
            self.cls_token = nnx.Param(jnp.zeros((1, 1, dim)))
        if config.reg_tokens:
            self.reg_token = nnx.Param(jnp.zeros((1, config.reg_tokens, dim)))
        self.pos_embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, config.num_positions, dim)))
        self.blocks = make_layers(lambda rngs: Block(config, rngs), config.depth, scan=config.scan_layers, rngs=rngs)
        if config.norm:
            self.norm = _layer_norm(config, rngs)
        if config.fc_norm:
            self.fc_norm = _layer_norm(config, rngs)
        if config.num_classes:
            self.head = nnx.Linear(dim, config.num_classes, kernel_init=INIT, rngs=rngs)

    def __call__(
        self, images: Float[Array, "batch height width 3"], *, paths: Float[Array, "batch depth 2"] | None = None
    ) -> Float[Array, "batch classes"]:
        """Logits, or pooled features without a head; `paths` are factors of every block's branches (drop path)."""
        x = self.features(images, paths=paths)
        return self.head(x) if self.config.num_classes else x

    def features(
        self, images: Float[Array, "batch height width 3"], *, paths: Float[Array, "batch depth 2"] | None = None
    ) -> Float[Array, "batch embed"]:
        """Pooled, normalised features, the input of the head."""
        config = self.config
        by_layer = None if paths is None else jnp.swapaxes(paths, 0, 1)
        x, _ = run_layers(self.blocks, self._embed(images), cache=by_layer, remat=config.remat)
        x = self.norm(x) if config.norm else x
        x = x[:, 0] if config.pool == "token" else x[:, config.num_prefix_tokens :].mean(axis=1)
        return self.fc_norm(x) if config.fc_norm else x

    def _embed(self, images: jax.Array) -> jax.Array:
        config = self.config
        x = self.patch_embed(images)
        prefix = [self.cls_token[...]] if config.class_token else []
        prefix += [self.reg_token[...]] if config.reg_tokens else []
        prefix = [jnp.broadcast_to(token, (x.shape[0], *token.shape[1:])) for token in prefix]
        if config.pos_embed_prefix:
            return jnp.concatenate([*prefix, x], axis=1) + self.pos_embed[...]
        return jnp.concatenate([*prefix, x + self.pos_embed[...]], axis=1)


def resize_positions(
    table: Float[Array, "1 positions embed"], *, grid: int, prefix: int
) -> Float[Array, "1 new_positions embed"]:
    """The position table on another patch grid, by antialiased bicubic interpolation (as timm does).

    Parameters
    ----------
    table
        Positions of the prefix tokens first, then of a square grid of patches, row by row.
    grid
        Patches along one side of the new image.
    prefix
        Leading rows that are not patches; they are kept.
    """
    old = round((table.shape[1] - prefix) ** 0.5)
    if old == grid:
        return table
    square = table[:, prefix:].reshape(1, old, old, -1)
    square = jax.image.resize(square, (1, grid, grid, square.shape[-1]), "bicubic", antialias=True)
    return jnp.concatenate([table[:, :prefix], square.reshape(1, grid * grid, -1)], axis=1)


def _kept(branch: jax.Array, paths: jax.Array | None, index: int) -> jax.Array:
    return branch if paths is None else branch * paths[:, index, None, None].astype(branch.dtype)


def _layer_norm(config: ViTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.embed_dim, epsilon=config.norm_eps, rngs=rngs)
