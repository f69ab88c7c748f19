"""Families of timm, with its own switches for small sizes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import timm
from family import Family, Heads, noise
from torch import nn

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}
STAGES = {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (2, 2, 4, 4)}
VIT_HEADS: Heads = {"q": {(4, 8)}, "v": {(4, 8)}}
CHANNELS = "channels attend to channels, so q carries and v chooses"
TALKING = "heads are mixed before and after softmax"

MODELS: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": VIT,
    "beitv2_base_patch16_224": VIT,
    "cait_xxs24_224": VIT,
    "caformer_s18": {"size": 64},
    "coat_lite_tiny": {"img_size": 64, "size": 64, "embed_dims": (32, 32, 32, 32), "serial_depths": (1, 1, 1, 1)},
    "coatnet_0_rw_224": {"size": 64, "img_size": 64},
    "convit_tiny": VIT,
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32), "size": 64},
    "crossvit_tiny_240": {"size": 240},
    "csatv2": {"size": 128},
    "davit_tiny": {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 4), "size": 64},
    "deit_tiny_distilled_patch16_224": VIT,
    "edgenext_xx_small": {"size": 64},
    "efficientformer_l1": {"size": 224},
    "efficientvit_b0": {"size": 64},
    "efficientvit_m0": {"size": 224},
    "eva02_tiny_patch14_224": VIT,
    "eva_giant_patch14_224": VIT,
    "fastvit_t8": {"size": 64},
    "fastvit_sa12": {"size": 64, "layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64)},
    "flexivit_small": VIT,
    "focalnet_tiny_srf": {"size": 64},
    "gcvit_xxtiny": {"size": 224},
    "hiera_tiny_224": {"size": 224, "embed_dim": 16, "num_heads": 2, "stages": (1, 1, 2, 1)},
    "inception_next_atto": {"size": 64},
    "levit_128s": {"size": 224},
    "mambaout_femto": {"size": 64},
    "maxvit_rmlp_pico_rw_256": {"size": 64, "img_size": 64},
    "maxxvitv2_nano_rw_256": {"size": 64, "img_size": 64},
    "mixer_s32_224": {"size": 224},
    "mobilevit_xxs": {"size": 128},
    "mobilevitv2_050": {"size": 64},
    "mvitv2_tiny": {"size": 64, "img_size": 64},
    "naflexvit_base_patch16_gap": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4},
    "nest_tiny": {"size": 64, "img_size": 64},
    "nextvit_small": {"size": 128},
    "pit_ti_224": {"size": 224},
    "poolformer_s12": {"size": 64},
    "pvt_v2_b0": {"size": 64},
    "pvt_v2_b2_li": {"size": 64, **STAGES},
    "regnety_002": {"size": 64},
    "resnet10t": {"size": 64},
    "samvit_base_patch16": VIT | {"global_attn_indexes": (1,), "window_size": 2, "neck_chans": 16},
    "sequencer2d_s": {"size": 224},
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_cr_tiny_ns_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "tiny_vit_5m_224": {"embed_dims": (16, 32, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 4), "size": 224},
    "tnt_s_legacy_patch16_224": {"size": 224, "depth": 2},
    "twins_pcpvt_small": {"size": 64, "img_size": 64, **STAGES},
    "twins_svt_small": {"size": 64, "img_size": 64, "embed_dims": (16, 16, 32, 32), "num_heads": (2, 2, 4, 4)},
    "visformer_tiny": {"size": 224},
    "vit_base_patch16_clip_224": VIT,
    "vit_base_patch16_rope_224": VIT,
    "vit_base_patch16_siglip_224": VIT,
    "vit_base_patch32_plus_256": VIT,
    "vit_relpos_small_patch16_224": VIT,
    "vit_small_patch14_dinov2": VIT,
    "vit_small_patch16_dinov3": VIT,
    "vit_dpwee_patch16_reg1_gap_256": VIT,
    "vit_little_patch16_reg1_gap_256": VIT,
    "vit_pwee_patch16_reg1_gap_256": VIT,
    "vit_tiny_patch16_224": VIT,
    "vitamin_small_224": {"size": 64, "img_size": 64},
    "volo_d1_224": {"size": 64, "img_size": 64},
    "xcit_nano_12_p16_224": VIT,
}
"""By the name of the model: its arguments, and ``size``, the height and width of the image where it is not 32."""

UNLIKE_ATTENTION: dict[str, str] = {
    "cait_xxs24_224": TALKING,
    "davit_tiny": CHANNELS,
    "edgenext_xx_small": CHANNELS,
    "xcit_nano_12_p16_224": CHANNELS,
}


def families() -> dict[str, Callable[[], Family]]:
    """All of them."""
    return {f"timm: {name}": partial(_family, name, settings) for name, settings in MODELS.items()}


def _family(name: str, settings: Mapping[str, Any]) -> Family:
    settings = dict(settings)
    size = settings.pop("size", 32)
    heads = VIT_HEADS if settings == VIT and name != "convit_tiny" else {}  # its width is that of one head
    return Family(
        partial(_model, name, settings),
        lambda _: {"x": noise(2, 3, size, size)},
        heads=heads,
        unlike_attention=UNLIKE_ATTENTION.get(name, ""),
    )


def _model(name: str, settings: Mapping[str, Any]) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=5, **settings)
