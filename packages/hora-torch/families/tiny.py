"""Any transformers configuration made tiny: the same few sizes under the many names that models give them."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers as tf
from family import ids, noise, outputs
from isolation import in_short
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_NAMES: dict[Any, str] = {
    64: "vocab_size vocab_size_per_layer_input image_vocab_size text_vocab_size src_vocab_size tgt_vocab_size "
    "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions max_length "
    "max_sequence_length max_seq_length max_2d_position_embeddings",
    32: "hidden_size d_model n_embd embed_dim dim emb_dim hidden_dim word_embed_proj_dim encoder_hidden_size lru_width "
    "embedding_size input_embedding_size text_embed_dim text_hidden_size cross_attention_hidden_size out_hidden_size "
    "decoder_hidden_size vision_hidden_size mm_hidden_size qformer_hidden_size attention_hidden_size encoder_embed_dim "
    "decoder_embed_dim image_size img_size encoder_hidden_dim projector_hidden_size d_latents audio_embed_dim",
    48: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner dff d_inner ffn_hidden_size mlp_dim "
    "intermediate_size_mlp dense_ffn_hidden_size feed_forward_hidden_size dim_feedforward encoder_feedforward_dim "
    "decoder_feedforward_dim linear_units ffn_size vision_intermediate_size feedforward_dim",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_intermediate_size "
    "expert_ffn_hidden_size moe_shared_expert_intermediate_size projection_dim proj_size num_mel_bins n_mels "
    "feature_size input_feat_per_channel moe_latent_size",
    8: "patch_size q_lora_rank kv_lora_rank qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim "
    "mamba_d_state ssm_state_size state_size mamba_state_size mamba_n_heads mamba_num_heads n_mamba_heads mamba_d_head "
    "mamba_head_dim index_head_dim hidden_size_per_layer_input o_lora_rank time_step_rank mamba_dt_rank",
    6: "d_kv kv_channels",
    5: "num_queries",
    4: "num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads qk_rope_head_dim num_experts "
    "num_local_experts n_routed_experts moe_num_experts linear_num_value_heads sliding_window attention_window_size "
    "local_attention num_conv_pos_embeddings index_n_heads encoder_num_attention_heads decoder_num_attention_heads",
    3: "num_query_tokens num_latents num_detection_tokens",
    2: "num_hidden_layers n_layer num_layers encoder_layers decoder_layers n_layers depth num_encoder_layers "
    "num_decoder_layers encoder_num_hidden_layers decoder_num_hidden_layers num_key_value_heads num_kv_heads "
    "n_head_kv swa_num_key_value_heads encoder_num_key_value_heads decoder_num_key_value_heads num_experts_per_tok "
    "moe_topk moe_k top_k_experts moe_top_k linear_num_key_heads num_frames num_feat_extract_layers "
    "num_conv_pos_embedding_groups num_hash_functions num_blocks temporal_patch_size num_codebooks",
    1: "n_shared_experts n_group topk_group num_shared_experts mamba_n_groups n_groups mamba_ngroups bos_token_id "
    "decoder_start_token_id first_k_dense_replace num_dense_layers",
    0: "pad_token_id",
}
SIZES = {name: value for value, names in _NAMES.items() for name in names.split()} | {"eos_token_id": 2}
STAGES = (
    dict.fromkeys(("num_heads", "num_attention_heads", "encoder_num_heads"), (2, 2, 4, 4))
    | {"conv_dim": (16, 16), "conv_kernel": (3, 3), "conv_stride": (2, 2)}
    | dict.fromkeys(("depths", "depth"), (1, 1, 1, 1))
    | dict.fromkeys(("hidden_sizes", "embed_dim", "embed_dims", "dims"), (16, 16, 32, 32))
)
"""Sizes of models with stages, each as long as the default."""
KEY_VALUE_HEADS = [name for name in SIZES if "key_value_heads" in name or name in ("num_kv_heads", "n_head_kv")]
VARIANTS = (  # tried in turn: some families ask for widths that fit
    {"head_dim": 12},
    {},
    {"head_dim": 8},
    dict.fromkeys(KEY_VALUE_HEADS, 4),
    {"head_dim": 8} | dict.fromkeys(KEY_VALUE_HEADS, 4),
)
KEEP = "keep"
"""As an override: the default."""
LIMIT = 30_000_000
"""Parameters of the largest model that is built."""

Inputs = Callable[[nn.Module], dict[str, Any]]

HEADS = (
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_MAPPING",
)


class NoModelError(Exception):
    """A configuration that no model of its own belongs to."""


def tiny(model_type: str, /, model: str = "", inputs: Inputs | None = None, **overrides: Any) -> nn.Module:
    """The first variant of a family that can be built and run.

    Parameters
    ----------
    model_type
        Name of the configuration.
    model
        Name of the model class; empty means the most usual one.
    inputs
        What it is run on; None means what its ``forward`` asks for.
    overrides
        Arguments of the configuration that have no usual size; a mapping changes a configuration inside.
    """
    config = CONFIG_MAPPING[model_type]
    cls = getattr(tf, model) if model else model_class(config)
    if cls is None:
        raise NoModelError(model_type)
    errors = []
    for variant in VARIANTS:
        try:
            return _built(cls, config(**sizes(config, variant, overrides)), inputs or inputs_of)
        except Exception as error:
            errors.append(in_short(error))
    raise ValueError(" | ".join(dict.fromkeys(errors)))


def _built(cls: type, config: Any, inputs: Inputs) -> nn.Module:
    with torch.device("meta"):
        count = sum(param.numel() for param in cls(config).parameters())
    if count > LIMIT:
        raise ValueError(f"{count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        outputs(model, inputs(model))
    return model


def model_class(config: type) -> type | None:
    """The most usual model of a configuration."""
    for heads in HEADS:
        mapping = getattr(modeling_auto, heads)
        if config in mapping:
            found = mapping[config]
            return found[0] if isinstance(found, tuple) else found
    return getattr(tf, config.__name__.replace("Config", "Model"), None)


def sizes(config: type, variant: Mapping[str, Any], overrides: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """Arguments that make a configuration, and those inside it, tiny."""
    fields, default = {field.name for field in dataclasses.fields(config)}, config()
    found = {name: value for name, value in (SIZES | variant).items() if name in fields}
    for name in fields:
        value = vars(default).get(name)
        if overrides.get(name) == KEEP:
            found[name] = value
        elif isinstance(value, tf.PreTrainedConfig) and type(value) is not config and depth < 3:
            changes = overrides.get(name, {}) if isinstance(overrides.get(name), Mapping) else {}
            found[name] = type(value)(**sizes(type(value), variant, changes, depth + 1))
        elif isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value) and name in STAGES:
            found[name] = list((STAGES[name] * 2)[: len(value)]) if name in SIZES else list(STAGES[name])
    changes = {name: value for name, value in overrides.items() if not _is_inside(value, found.get(name))}
    return found | {name: value for name, value in changes.items() if value != KEEP}


def _is_inside(change: Any, current: Any) -> bool:
    return isinstance(change, Mapping) and isinstance(current, tf.PreTrainedConfig)


def inputs_of(model: nn.Module) -> dict[str, Any]:
    """What a model's ``forward`` asks for, by the names of its arguments."""
    config, asked = model.config, inspect.signature(model.forward).parameters
    needed = {name for name, param in asked.items() if param.default is param.empty}
    if "grid_thw" in asked:
        return dict(_packed(config, set(asked)))
    return dict(_inputs(config, set(asked), needed | {model.main_input_name}))


def _packed(config: Any, names: set[str]) -> Iterator[tuple[str, Any]]:
    """Patches of one image as a list of vectors, for the vision towers of the Qwen-VL kind."""
    channels = next(
        getattr(config, name) for name in ("in_channels", "in_chans", "num_channels") if hasattr(config, name)
    )
    width = channels * getattr(config, "temporal_patch_size", 1) * config.patch_size**2
    yield next(name for name in ("hidden_states", "pixel_values") if name in names), noise(16, width)
    yield "grid_thw", torch.tensor([[1, 4, 4]])


def _inputs(config: Any, names: set[str], main: set[str]) -> Iterator[tuple[str, Any]]:
    both = {"pixel_values", "input_ids"} <= names and not hasattr(config, "image_token_id")
    if "pixel_values" in main or both:
        yield "pixel_values", _image(getattr(config, "vision_config", config))
    if "input_ids" in main or both:
        yield "input_ids", ids()
    if "input_features" in main:
        yield "input_features", noise(2, getattr(config, "num_mel_bins", 16), 64)
    if "input_values" in main:
        yield "input_values", noise(2, 1600)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        yield "decoder_input_ids", ids(2, 5)
    if "bbox" in names:
        yield "bbox", torch.zeros(2, 7, 4, dtype=torch.long)
    if "use_cache" in names:
        yield "use_cache", False


def _image(config: Any) -> Tensor:
    size = getattr(config, "image_size", 32) or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return noise(2, getattr(config, "num_channels", 3) or 3, height, width)
