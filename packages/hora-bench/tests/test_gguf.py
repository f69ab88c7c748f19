"""The NumPy reading of GGUF files equals transformers, and a file in another layout does not."""

import gguf
import numpy as np
import pytest
import torch
import transformers
from hora_bench.offline import gguf_logits, needs
from hora_spec import HoraError

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.": "ffn_",
    "_proj": "",
}


def tiny_llama(*, tied):
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    rope = {"rope_type": "default", "rope_theta": 5e4}
    config = transformers.LlamaConfig(**shape, **heads, rope_parameters=rope, rms_norm_eps=1e-3)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double()


def write_gguf(path, model, *, interleaved=True):
    """As llama.cpp writes it: the rows of Q and K are permuted so that rotary pairs are neighbours."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight, short = tensor.numpy(), name
        for theirs, ours in NAMES.items():
            short = short.replace(theirs, ours)
        if interleaved and ("q_proj" in name or "k_proj" in name):
            halves = weight.reshape(-1, 2, config.head_dim // 2, config.hidden_size)
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(short, np.ascontiguousarray(weight, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def difference(path, model):
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    return np.abs(gguf_logits(path, TOKENS) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("tied", [True, False])
def test_logits_from_the_file_are_those_of_transformers(tied, tmp_path):
    model = tiny_llama(tied=tied)
    write_gguf(tmp_path / "model.gguf", model)
    assert difference(tmp_path / "model.gguf", model) < 1e-6  # transformers' rotary tables are float32


def test_a_wrong_rotary_layout_shows(tmp_path):
    model = tiny_llama(tied=True)
    write_gguf(tmp_path / "model.gguf", model, interleaved=False)
    assert difference(tmp_path / "model.gguf", model) > 1e-3


def test_without_the_extra_the_package_to_install_is_named():
    needs("gguf")
    with pytest.raises(HoraError, match=r"got none installed: pip install hora-bench\[offline\]"):
        needs("no_such_package")
