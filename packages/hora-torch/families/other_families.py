"""Families of torch.nn and diffusers, and attention as people write it themselves."""

from collections.abc import Callable
from typing import Any

import torch
from family import Family, Heads, noise
from torch import Tensor, nn

HEADS: Heads = {"q": {(4, 8)}, "v": {(4, 8)}}


class Encoder(nn.Module):
    """``nn.TransformerEncoder``, padded at the end."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, **settings), 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Encoded `x`."""
        return self.encoder(x, src_key_padding_mask=padding)


class Decoder(nn.Module):
    """``nn.TransformerDecoder``."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48, dropout=0.0), 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Decoded `x`."""
        return self.decoder(x, memory)


class Cross(nn.Module):
    """One ``nn.MultiheadAttention`` with keys and values of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, kdim=20, vdim=24, batch_first=True, add_bias_kv=True)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of `x` to `k`."""
        return self.attention(x, k, v, need_weights=False)[0]


class SelfAttention(nn.Module):
    """The usual attention of one's own, with the head count in ``heads``."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.to_qkv, self.to_out = nn.Linear(32, 96, bias=False), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Attention of `x` to itself."""
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, -1))
        return self.to_out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Interleaved(SelfAttention):
    """The same module names, with rows in the order ``[head][q k v]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Attention of `x` to itself."""
        q, k, v = self.to_qkv(x).unflatten(-1, (4, 24)).transpose(1, 2).chunk(3, -1)
        return self.to_out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _told(order: str) -> dict[str, Any]:
    return {"target_modules": ["to_qkv"], "row_order": {"to_qkv": order}, "num_heads": 4, "num_kv_heads": 4}


def unet(**settings: Any) -> nn.Module:
    """A small denoising network with cross-attention."""
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        **settings,
    )


def fused_unet() -> nn.Module:
    """The same with q, k and v in one projection beside the separate ones."""
    from diffusers.models.attention_processor import FusedAttnProcessor2_0

    model = unet()
    model.fuse_qkv_projections()
    model.set_attn_processor(FusedAttnProcessor2_0())
    return model


def dit() -> nn.Module:
    """A diffusion transformer."""
    import diffusers

    return diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )


def flux() -> nn.Module:
    """A Flux transformer."""
    import diffusers

    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )


def sd3() -> nn.Module:
    """A Stable Diffusion 3 transformer."""
    import diffusers

    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
    )


X, TIME, TEXT = noise(2, 6, 32), torch.tensor([1, 2]), noise(2, 5, 16)
IMAGE = {"sample": noise(2, 4, 8, 8), "timestep": TIME, "encoder_hidden_states": TEXT}
PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])


def families() -> dict[str, Callable[[], Family]]:
    """All of them."""
    positions = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    found = {
        "torch.nn: TransformerEncoder": Family(
            lambda: Encoder(batch_first=True), lambda _: {"x": X}, ("self_attn",), HEADS
        ),
        "torch.nn: TransformerEncoder, norm first": Family(
            lambda: Encoder(norm_first=True), lambda _: {"x": X}, ("self_attn",), HEADS
        ),
        "torch.nn: TransformerEncoder, padded": Family(
            lambda: Encoder(batch_first=True), lambda _: {"x": X, "padding": PADDING}, ("self_attn",), HEADS
        ),
        "torch.nn: TransformerDecoder": Family(
            Decoder, lambda _: {"x": X, "memory": noise(5, 6, 32)}, ("self_attn", "multihead_attn"), HEADS
        ),
        "torch.nn: MultiheadAttention, kdim and vdim": Family(
            Cross, lambda _: {"x": X, "k": noise(2, 5, 20), "v": noise(2, 5, 24)}, ("attention",), HEADS
        ),
        "own: to_qkv": Family(SelfAttention, lambda _: {"x": X}, ("to_qkv",), HEADS, _told("q k v")),
        "own: to_qkv, rows interleaved": Family(
            Interleaved, lambda _: {"x": X}, ("to_qkv",), HEADS, _told("[head][q k v]")
        ),
        "diffusers: UNet2DConditionModel": Family(unet, lambda _: IMAGE, ("to_q", "to_v")),
        "diffusers: UNet2DConditionModel, fused": Family(fused_unet, lambda _: IMAGE, ("to_qkv", "to_kv", "to_q")),
        "diffusers: DiTTransformer2DModel": Family(
            dit,
            lambda _: {"hidden_states": noise(2, 4, 8, 8), "timestep": TIME, "class_labels": TIME},
            ("to_q", "to_v"),
        ),
        "diffusers: FluxTransformer2DModel": Family(
            flux,
            lambda _: {
                "hidden_states": noise(2, 16, 4),
                "encoder_hidden_states": noise(2, 5, 32),
                "pooled_projections": noise(2, 32),
                "timestep": torch.tensor([0.1, 0.2]),
                **positions,
            },
            ("to_q", "to_v"),
        ),
        "diffusers: SD3Transformer2DModel": Family(
            sd3,
            lambda _: {
                "hidden_states": noise(2, 4, 8, 8),
                "encoder_hidden_states": noise(2, 5, 32),
                "pooled_projections": noise(2, 32),
                "timestep": TIME,
            },
            ("to_q", "to_v"),
        ),
    }
    return {name: lambda family=family: family for name, family in found.items()}
