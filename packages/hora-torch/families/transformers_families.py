"""What families of transformers need beside the usual tiny sizes, and variants whose rows or heads differ."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as tf
from family import Family, Heads, ids, noise
from tiny import CONFIG_MAPPING, KEEP, Inputs, inputs_of, tiny
from torch import nn

RESNET = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
DETR = {"backbone_config": RESNET, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}, "head_dim": 8}
HALF_MROPE = {"rope_parameters": MROPE["rope_parameters"] | {"mrope_section": [0, 1, 1], "partial_rotary_factor": 0.5}}
MROPE_TEXT = {"text_config": {"rope_parameters": MROPE["rope_parameters"]}}
HYBRID_TEXT = {"text_config": {"layer_types": ["linear_attention", "full_attention"]}}
DEFAULT_BACKBONE = {"backbone_config": KEEP, "encoder_in_channels": KEEP, "decoder_in_channels": [32, 32, 32]}
SERIES = {"prediction_length": 4, "context_length": 6, "lags_sequence": [1], "num_time_features": 1, "d_model": 32}
SERIES_INPUTS = {
    "past_values": noise(2, 7),
    "past_time_features": noise(2, 7, 1),
    "past_observed_mask": torch.ones(2, 7),
    "future_values": noise(2, 4),
    "future_time_features": noise(2, 4, 1),
}
STAGES = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}

FRAMES_FIRST = [
    *("audio-spectrogram-transformer", "canary", "cohere_asr", "lasr_ctc", "lasr_encoder", "nemotron3_5_asr"),
    *("nemotron_asr_streaming", "nemotron_asr_streaming_encoder", "parakeet_ctc", "parakeet_encoder", "parakeet_rnnt"),
    *("parakeet_tdt", "speech_to_text"),
]
FULL_LENGTH = ["voxtral_encoder", "qwen2_audio_encoder", "moss_transcribe_diarize_audio", "whisper"]
VIDEOS = ["timesformer", "videomae", "vivit", "vjepa2", "videoprism_vision_model"]


def frames_first(model: nn.Module) -> dict[str, Any]:
    """Spectrograms as speech encoders of the Conformer kind take them: batch x frames x mel bins."""
    name = "input_values" if model.main_input_name == "input_values" else "input_features"
    return {**inputs_of(model), name: noise(2, 64, getattr(model.config, "num_mel_bins", 16))}


def full_length(model: nn.Module) -> dict[str, Any]:
    """Spectrograms that fill the positions of encoders of the Whisper kind."""
    return {**inputs_of(model), "input_features": noise(2, 16, 2 * model.config.max_source_positions)}


def video(model: nn.Module) -> dict[str, Any]:
    """Two frames."""
    text = {"input_ids": ids()} if model.main_input_name == "input_ids" else {}
    name = "pixel_values" if "pixel_values" in inspect.signature(model.forward).parameters else "pixel_values_videos"
    return {**text, name: noise(2, 2, 3, 32, 32)}


INPUTS: dict[str, Inputs] = {
    **dict.fromkeys(FRAMES_FIRST, frames_first),
    **dict.fromkeys(FULL_LENGTH, full_length),
    **dict.fromkeys(VIDEOS, video),
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), lambda _: SERIES_INPUTS),
    **dict.fromkeys(
        ["patchtst", "patchtsmixer"],
        lambda model: {"past_values": noise(2, model.config.context_length, model.config.num_input_channels)},
    ),
    "decision_transformer": lambda _: {
        "states": noise(2, 4, 17),
        "actions": noise(2, 4, 4),
        "rewards": noise(2, 4, 1),
        "returns_to_go": noise(2, 4, 1),
        "timesteps": torch.arange(4).expand(2, 4),
        "attention_mask": torch.ones(2, 4),
    },
    "pix2struct": lambda _: {"flattened_patches": noise(2, 6, 770).abs(), "decoder_input_ids": ids(2, 5)},
    "perceiver": lambda _: {"inputs": noise(2, 7, 32)},
    "reformer": lambda _: {"input_ids": ids(2, 8)},
    "siglip2_vision_model": lambda _: {
        "pixel_values": noise(2, 4, 192),
        "pixel_attention_mask": torch.ones(2, 4),
        "spatial_shapes": torch.tensor([[2, 2], [2, 2]]),
    },
}
"""Inputs of models whose ``forward`` does not say enough."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": SERIES,
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "conditional_detr": DETR,
    "dab-detr": DETR,
    "dbrx": {
        "attn_config": tf.models.dbrx.configuration_dbrx.DbrxAttentionConfig(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4)
    },
    "deformable_detr": DETR,
    "detr": DETR,
    "donut-swin": STAGES,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "d_fine": DEFAULT_BACKBONE,
    "deimv2": DEFAULT_BACKBONE,
    "pp_doclayout_v2": DEFAULT_BACKBONE,
    "pp_doclayout_v3": DEFAULT_BACKBONE,
    "pp_doclayout_v4": DEFAULT_BACKBONE,
    "rt_detr": DEFAULT_BACKBONE,
    "rt_detr_v2": DEFAULT_BACKBONE,
    "gemma4": {"text_config": {"global_head_dim": 16}},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm46v": MROPE_TEXT,
    "glm4v": MROPE_TEXT,
    "glm4v_moe": {"text_config": HALF_MROPE},
    "glm4v_moe_text": HALF_MROPE,
    "glm_image": {"text_config": HALF_MROPE},
    "glm_ocr": {"text_config": HALF_MROPE},
    "qwen2_5_omni_thinker": MROPE_TEXT,
    "qwen3_5": HYBRID_TEXT,
    "qwen3_5_moe": HYBRID_TEXT,
    "glm4v_text": MROPE,
    "glm_image_text": MROPE,
    "glm_ocr_text": MROPE,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hiera": {
        "image_size": [32, 32],
        "patch_size": [3, 3],
        "patch_stride": [4, 4],
        "patch_padding": [1, 1],
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 4],
        "masked_unit_size": [2, 2],
        "masked_unit_attention": [True, False],
        "num_query_pool": 1,
    },
    "informer": SERIES,
    "cvt": {"embed_dim": [16, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 1, 1]},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48, "num_attention_heads": 4},
    "longcat_flash": {"head_dim": 4},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 16},
    "qwen3_5_moe_text": HYBRID_TEXT["text_config"],
    "qwen3_5_text": HYBRID_TEXT["text_config"],
    "qwen3_next": HYBRID_TEXT["text_config"],
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "num_buckets": 2,
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
    },
    "kimi_linear": {"linear_num_heads": 4, "linear_head_dim": 8},
    "led": {"attention_window": 4},
    "longformer": {"attention_window": 4},
    "levit": {
        "image_size": 64,
        "patch_size": 16,
        "hidden_sizes": [32, 32, 32],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    },
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mgp-str": {"image_size": [32, 32], "patch_size": 8, "max_token_length": 5},
    "mobilevit": {"image_size": 128},
    "glpn": {"image_size": 64},
    "pvt": {"image_size": 64},
    "pvt_v2": {"image_size": 64},
    "segformer": {"image_size": 128},
    "qwen2_5_vl": MROPE_TEXT,
    "qwen2_5_vl_text": MROPE,
    "qwen2_vl": MROPE_TEXT,
    "qwen2_vl_text": MROPE,
    "swin": STAGES,
    "swinv2": STAGES,
    "table-transformer": DETR,
    "time_series_transformer": SERIES,
    "timesformer": {"num_frames": 2},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "yolos": {"image_size": [32, 32]},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "attention_hidden_size": 64},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}
"""Arguments of configurations for which no usual size is right."""

CROSS = {"encoder_hidden_states": noise(2, 5, 32), "use_cache": False}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bart, unequal heads": ("bart", {"decoder_attention_heads": 2}),
    "clip, unequal heads": ("clip", {"text_config": {"num_attention_heads": 2}}),
    "falcon, grouped": ("falcon", {"new_decoder_architecture": True}),
    "falcon, all heads": ("falcon", {"multi_query": False, "alibi": True}),
    "gpt2, with cross-attention": (
        "gpt2",
        {"add_cross_attention": True, "inputs": lambda _: {"input_ids": ids()} | CROSS},
    ),
    "gpt_bigcode, all heads": ("gpt_bigcode", {"multi_query": False}),
    "minimax, all heads": ("minimax", {"num_key_value_heads": 4}),
    "qwen2_vl, with an image": (
        "qwen2_vl",
        MROPE_TEXT
        | {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
        | {"inputs": lambda model: _packed_image(model.config)},
    ),
}
"""Families whose rows or heads differ with an argument: the model type, and what is changed."""


def _packed_image(config: Any) -> dict[str, Any]:
    tokens = ids(1, 8)
    tokens[:, 0], tokens[:, 1:5] = config.vision_start_token_id, config.image_token_id
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    image = {"pixel_values": noise(16, width), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return {"input_ids": tokens, "mm_token_type_ids": (tokens == config.image_token_id).int()} | image


_STATE_SPACE = {"target_modules": ["in_proj"], "fused_projections": ("x", "b", "c")}
TOLD: dict[str, dict[str, Any]] = {
    "bamba, state space": _STATE_SPACE,
    "falcon_h1, state space": _STATE_SPACE,
    "granitemoehybrid, state space": _STATE_SPACE,
    "mamba2": _STATE_SPACE,
    "nemotron_h, state space": _STATE_SPACE,
    "zamba2, state space": _STATE_SPACE,
    "aria, with its projector": {"target_modules": ["q_proj", "v_proj", "multihead_attn"]},
    "deepseek_v4, keys that are values": {"target_modules": ["self_attn.q_b_proj", "self_attn.kv_proj"]},
    "llama, all linear maps": {"target_modules": "all-linear"},
    "qwen3_5_text, linear attention": {"target_modules": ["in_proj_qkv"]},
    "qwen3_next, linear attention": {"target_modules": ["in_proj_qkvz"]},
    "qwen4_exp_text": {"target_modules": ["in_proj_qkv"]},
    "reformer, queries that are keys": {"target_modules": ["query", "query_key", "value"]},
    "rwkv": {"target_modules": ["key", "value", "receptance", "output"]},
    "squeezebert": {"target_modules": ["query", "value"]},
    "wavlm": {"target_modules": "all-linear"},
}
"""How families are adapted where the default does not do; a variant has the name of its model first."""


UNLIKE_ATTENTION: dict[str, tuple[str, Heads]] = {
    "convbert": ("a convolution joins the heads of q", {"q": {(2, 8)}, "v": {(2, 8)}}),
    "deepseek_v4": ("its output projection reads heads in groups", {"q": {(4, 12)}, "kv": {(1, 12)}}),
    "diffllama": ("two heads of v make one of the output", {"q": {(4, 12)}, "v": {(2, 12)}}),
    "jetmoe": ("its output projection is a mixture of experts", {"v": {(2, 6)}}),
    "yoso": ("its output is normalised head by head", {"q": {(4, 8)}, "v": {(4, 8)}}),
    "zaya": ("its projections are a module without the attention", {"q": {(4, 12)}}),
    "neomme": ("v takes itself out of the output", {"q": {(4, 64)}, "v": {(2, 64)}}),
    "doge": ("v decides what is masked", {"q": {(4, 8)}, "v": {(2, 8)}}),
}
"""Why gradients do not tell rows and heads, and the true heads, read in the source."""

NOT_COMPARABLE = {
    "fastspeech2_conformer": "the length of its output is rounded from what it computes",
    "vits": "the length of its output is rounded from what it computes",
}


def families() -> dict[str, Callable[[], Family]]:
    """All model types that have a model class, and the variants."""
    named = {name: (name, OVERRIDES.get(name, {})) for name in sorted(CONFIG_MAPPING.keys())}
    named |= {name: (model, OVERRIDES.get(model, {})) for name in TOLD if (model := name.partition(",")[0]) != name}
    return {name: partial(_family, name, *what) for name, what in (named | VARIANTS).items()}


def _family(name: str, model_type: str, overrides: dict[str, Any]) -> Family:
    if name in NOT_COMPARABLE:
        raise ValueError(NOT_COMPARABLE[name])
    inputs = overrides.get("inputs") or INPUTS.get(model_type, inputs_of)
    unlike, heads = UNLIKE_ATTENTION.get(model_type, ("", {}))
    build = partial(tiny, model_type, **{**overrides, "inputs": inputs})
    return Family(build, inputs, heads=heads, told=TOLD.get(name, {}), unlike_attention=unlike)
