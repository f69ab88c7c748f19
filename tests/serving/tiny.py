"""Tiny random language models, as `transformers` saves them and as GGUF files, converted independently of hora_spec."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

VOCABULARY = 192
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
"""Architecture in GGUF to class in transformers."""

_CONV1D = ("c_attn", "c_proj", "c_fc")


def language_model(arch: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A model with grouped queries, where its architecture has them, whose logits depend on each of its weights."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 128}
    if arch != "gpt2":
        heads |= {"num_key_value_heads": 2, "head_dim": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    model_class = getattr(transformers, ARCHITECTURES[arch])
    torch.manual_seed(seed)
    config = model_class.config_class(**(sizes | heads | tokens | changes))
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name), std=0.15)
    return model


def write_gguf(path: Path, model: Any) -> Path:
    """The model in float32, as llama.cpp's own converter lays it out."""
    config, arch = model.config, {name: arch for arch, name in ARCHITECTURES.items()}[type(model).__name__]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(4 * config.hidden_size if arch == "gpt2" else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if arch == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(head_dim)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if arch == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or config.max_position_embeddings)
    _add_tokens(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(writer_arch(arch), config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        weight = tensor.float().numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):  # rotary pairs become neighbours
            weight = weight.reshape(-1, 2, head_dim // 2, config.hidden_size).swapaxes(1, 2).reshape(weight.shape)
        if arch == "gpt2" and weight.ndim == 2 and any(part in name for part in _CONV1D):
            weight = weight.T
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rewritten(source: Path, target: Path, *, fields: Any = None, dropped: Any = (), quantised: Any = None) -> Path:
    """A GGUF file with other fields, without some tensors, or quantised."""
    reader = gguf.GGUFReader(source)
    arch = (fields or {}).get("general.architecture", "llama")
    writer = gguf.GGUFWriter(target, arch)
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")) and (fields or {}).get(name, True) is not None:
            kind = field.types[0]
            value = (fields or {}).get(name, field.contents())
            writer.add_key_value(name, value, kind, field.types[-1] if len(field.types) > 1 else None)
    for name, (value, kind) in ((k, v) for k, v in (fields or {}).items() if isinstance(v, tuple)):
        writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        if tensor.name in dropped:
            continue
        if quantised is not None and tensor.data.ndim == 2:
            data = gguf.quants.quantize(np.array(tensor.data), quantised)
            writer.add_tensor(tensor.name, data, raw_dtype=quantised)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def writer_arch(arch: str) -> Any:
    """The member of gguf's enumeration that an architecture is."""
    return {name: member for member, name in gguf.MODEL_ARCH_NAMES.items()}[arch]


def _add_tokens(writer: Any, size: int) -> None:
    """Words and the bytes of ASCII: one that is no whole character would be answered without probabilities."""
    tokens = [("<unk>", gguf.TokenType.UNKNOWN), ("<s>", gguf.TokenType.CONTROL), ("</s>", gguf.TokenType.CONTROL)]
    tokens += [(f"<0x{byte:02X}>", gguf.TokenType.BYTE) for byte in range(128)] + [("\u2581", gguf.TokenType.NORMAL)]
    tokens += [(f"\u2581word{i}", gguf.TokenType.NORMAL) for i in range(size - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
