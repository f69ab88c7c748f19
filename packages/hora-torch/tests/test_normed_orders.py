"""Orders of rows whose heads are normalised, so that scaling them shows nothing: another construction does."""

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

from .test_row_order import EMBED, HEAD_DIM, HEADS, TOKENS, first, heads_of, load, tokens

TWO_MAPS = {
    "to_qkv": ("transformers.transformer_stable_audio3.StableAudio3SelfAttention", ("q", "q2", "k", "k2", "v")),
    "to_kv": ("transformers.transformer_stable_audio3.StableAudio3CrossAttention", ("k", "k2", "v")),
    "to_q": ("transformers.transformer_stable_audio3.StableAudio3CrossAttention", ("q", "q2")),
}


@pytest.mark.parametrize("own", TWO_MAPS)
def test_two_attention_maps_take_each_other_away_once_the_rows_said_to_be_the_second_are_those_of_the_first(own):
    pytest.importorskip("diffusers")
    path, parts = TWO_MAPS[own]
    cls = load(f"diffusers.models.{path}")
    torch.manual_seed(0)
    crosses = own != "to_qkv"
    attention = cls(EMBED, EMBED, HEAD_DIM) if crosses else cls(EMBED, HEAD_DIM)
    for weight in attention.parameters():
        nn.init.normal_(weight, std=0.3)
    extra = {"context": tokens(1, 3, EMBED)} if crosses else {"rope": torch.zeros(TOKENS, HEAD_DIM)}
    found = {name: heads_of(attention, name) for name in (("to_q", "to_kv") if crosses else ("to_qkv",))}
    assert tuple(found[own]) == parts
    assert {len(heads) for heads in found[own].values()} == {HEADS}

    def call():
        with torch.no_grad():
            return attention(tokens(1, TOKENS, EMBED), **extra)

    assert call().abs().max() > 1e-2
    for name, held in found.items():
        weight = attention.get_submodule(name).weight.data
        for head in range(HEADS):
            for role in [role for role in ("q", "k") if role in held]:
                weight[held[f"{role}2"][head]] = weight[held[role][head]]
                assert (call().abs().max() < 1e-5) == (role == "k" and head == HEADS - 1 and name != "to_q")


def test_rows_of_xlstm_are_those_of_its_separate_projections():
    cls = load("transformers.models.xlstm.modeling_xlstm.xLSTMLayer")
    layers = {
        mode: cls(tf.xLSTMConfig(hidden_size=EMBED, num_heads=HEADS, weight_mode=mode)) for mode in ("single", "fused")
    }
    single, fused = layers.values()
    torch.manual_seed(0)
    for weight in single.parameters():
        nn.init.normal_(weight, std=0.3)
    names = {"q": "q", "k": "k", "v": "v", "gate": "ogate_preact"}
    with torch.no_grad():
        for part, heads in heads_of(fused, "qkv_opreact").items():
            fused.qkv_opreact.weight[np.concatenate(heads)] = single.get_submodule(names[part]).weight
        for name in ("weight", "bias"):
            both = (getattr(single.igate_preact, name), getattr(single.fgate_preact, name))
            getattr(fused.ifgate_preact, name).copy_(torch.cat(both))
        fused.multihead_norm.load_state_dict(single.multihead_norm.state_dict())
        fused.out_proj.load_state_dict(single.out_proj.state_dict())
        torch.testing.assert_close(first(fused(tokens())), first(single(tokens())))
