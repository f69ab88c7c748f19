"""Tiny models with random weights under the names that PEFT's tests ask the hub for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as tf

TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = TEXT | {"num_key_value_heads": 2}
GPT = {
    "vocab_size": 100,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
BART = {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 128,
}

Build = Callable[[], tf.PreTrainedModel]


def _opt() -> tf.PreTrainedModel:
    sizes = {"ffn_dim": 37, "word_embed_proj_dim": 32}
    return tf.OPTForCausalLM(tf.OPTConfig(**{k: v for k, v in TEXT.items() if k != "intermediate_size"}, **sizes))


def _encoder(name: str, head: str, **kwargs: Any) -> Build:
    def build() -> tf.PreTrainedModel:
        config = getattr(tf, f"{name}Config")(**(TEXT | {"type_vocab_size": 2} | kwargs))
        return getattr(tf, f"{name}{head}")(config)

    return build


MODELS: Mapping[str, Build] = {
    "tiny-random-OPTForCausalLM": _opt,
    "tiny-random-GPT2LMHeadModel": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT)),
    "tiny-random-gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT)),
    "tiny-random-GPTJForCausalLM": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**GPT, rotary_dim=4)),
    "tiny-random-LlamaForCausalLM": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GQA)),
    "tiny-random-MistralForCausalLM": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GQA)),
    "tiny-dummy-qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GQA)),
    "tiny-random-Gemma3ForCausalLM": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GQA, head_dim=8)),
    "tiny-random-T5ForConditionalGeneration": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**T5, decoder_start_token_id=0)
    ),
    "tiny-random-BartForConditionalGeneration": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART)),
    "tiny-random-BertModel": _encoder("Bert", "Model"),
    "tiny-random-RobertaModel": _encoder("Roberta", "Model"),
    "tiny-random-DebertaV2Model": _encoder("DebertaV2", "Model"),
    "tiny-random-BertForSequenceClassification": _encoder("Bert", "ForSequenceClassification"),
    "tiny-random-RobertaForSequenceClassification": _encoder("Roberta", "ForSequenceClassification"),
    "tiny-random-LlamaForSequenceClassification-3.2": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**GQA)),
    "tiny-random-BertForTokenClassification": _encoder("Bert", "ForTokenClassification"),
    "tiny-random-RobertaForTokenClassification": _encoder("Roberta", "ForTokenClassification"),
}


def local(hub_id: str, folder: Path) -> str | None:
    """Path of a saved model that stands for `hub_id`, None when there is none."""
    name = hub_id.rpartition("/")[2]
    if name not in MODELS:
        return None
    path = folder / name
    if not path.exists():
        torch.manual_seed(0)
        MODELS[name]().save_pretrained(path)
    return str(path)
