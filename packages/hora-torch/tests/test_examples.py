"""The examples run, on tiny models."""

import importlib.util
import pydoc_data.topics
from pathlib import Path

import hora_spec
import peft
import pytest
import tokenizers
import torch
import transformers

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def base(families, tmp_path):
    """Directory of a tiny model and a tokenizer of letters, as they lie on the hub."""
    model = families["llama"].model()
    model.save_pretrained(tmp_path / "base")
    letters = {letter: index for index, letter in enumerate("?etaoinshrdlu"[: model.config.vocab_size])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    fast.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # torch without accelerator
def test_the_trainer_example(base, families, tmp_path, capsys, monkeypatch):
    topics = {"topic": 300 * "the quick brown fox and the lazy dog "}
    monkeypatch.setattr(pydoc_data.topics, "topics", topics)
    example("llama_trainer").main(base, str(tmp_path / "out"), steps=2)
    printed = capsys.readouterr().out
    assert "model.layers.0.self_attn and 1 more" in printed
    assert "loss on held-out text" in printed
    assert len(hora_spec.load_adapter(tmp_path / "out/adapter").layers) == 2
    lora = peft.PeftModel.from_pretrained(families["llama"].model(), tmp_path / "out/lora").eval()
    merged = type(families["llama"].model()).from_pretrained(tmp_path / "out/merged").eval()
    with torch.no_grad():
        inputs = families["llama"].inputs()
        torch.testing.assert_close(lora(**inputs).logits, merged(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_the_adapters_of_the_example_each_know_their_own(base, capsys):
    example("several_adapters").main(base, steps=3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["french", "latin", "both", "one"]


def test_the_timm_example(tmp_path, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    sizes = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 4}
    example("timm_loop").main("vit_tiny_patch16_224", str(tmp_path), steps=2, size=32, **sizes)
    assert "q 4x8x32, v 4x8x32" in capsys.readouterr().out
    adapter = hora_spec.load_adapter(tmp_path)
    assert list(adapter.layers) == ["blocks.0.attn", "blocks.1.attn"]
    assert sorted(adapter.modules) == ["head.bias", "head.weight"]


def test_the_few_shot_example_compares_equal_numbers_of_parameters(capsys):
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 4}
    example("joint_few_shot").main("vit_tiny_patch16_224", steps=2, **sizes)
    lora, joint = capsys.readouterr().out.splitlines()
    assert lora.startswith("LoRA")
    assert joint.startswith("joint A")
    assert lora.split(":")[1].split()[0] == joint.split(":")[1].split()[0]
