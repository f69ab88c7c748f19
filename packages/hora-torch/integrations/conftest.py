"""Tiny random models and a tokenizer, on disk and offline, for libraries that know nothing of HoRA."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

from pathlib import Path

import pytest
import tokenizers
import torch
import transformers as tf
from hora_torch import HoraConfig

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "a", "mat", "road", "good", "bad", "user", "assistant", ":"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="session")
def tokenizer() -> tf.PreTrainedTokenizerFast:
    """Words of a little language."""
    vocab = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=model, chat_template=TEMPLATE, **special)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: tf.PreTrainedTokenizerFast) -> Path:
    """Directory of a language model with its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        **sizes,
        **ids,
    )
    folder = tmp_path_factory.mktemp("base")
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config(**kwargs: object) -> HoraConfig:
    """A small adapter."""
    return HoraConfig(**{"r": 2, "hidden_dim": 8, "head_embed_dim": 6, "task_type": "CAUSAL_LM"} | kwargs)


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Output for a fixed input."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(2, 14)[None]).logits
