"""The examples run, on tiny models."""

import importlib.util
from pathlib import Path

import hora_spec
import peft
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # torch without accelerator
def test_the_trainer_example(families, tmp_path, capsys):
    families["llama"].model().save_pretrained(tmp_path / "base")
    example("llama_trainer").main(str(tmp_path / "base"), str(tmp_path / "out"), steps=2)
    assert "model.layers.0.self_attn and 1 more" in capsys.readouterr().out
    assert len(hora_spec.load_adapter(tmp_path / "out/adapter").layers) == 2
    lora = peft.PeftModel.from_pretrained(families["llama"].model(), tmp_path / "out/lora").eval()
    merged = type(families["llama"].model()).from_pretrained(tmp_path / "out/merged").eval()
    with torch.no_grad():
        inputs = families["llama"].inputs()
        torch.testing.assert_close(lora(**inputs).logits, merged(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_the_timm_example(tmp_path, capsys):
    pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 4}
    example("timm_loop").main("vit_tiny_patch16_224", str(tmp_path), steps=2, **sizes)
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
