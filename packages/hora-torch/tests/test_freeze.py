"""A frozen adapter is its factors: the same numbers, the memory of its LoRA."""

import copy
import pickle

import hora_spec
import hora_torch
import peft
import pytest
import torch
from hora_spec import HoraError
from safetensors.torch import load_file

from .oracle import adapted, agree, config, evaluate, parameters


@pytest.fixture
def family(families):
    return families["llama"]


@pytest.fixture
def model(family):
    return adapted(family)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "timm-vit", "mha"])
def test_a_frozen_adapter_computes_the_same_with_the_memory_of_its_lora(families, name, tmp_path):
    family = families[name]
    model = adapted(family, hora_alpha=3.0)
    expected = evaluate(model, family.inputs())
    hora_torch.export_lora(model, tmp_path / "lora")
    hora_torch.freeze(model)
    agree(evaluate(model, family.inputs()), expected)
    held = [*model.named_parameters(), *model.named_buffers()]
    size = sum(tensor.numel() for key, tensor in held if "hora_" in key)
    lora = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert 0 < size <= sum(tensor.numel() for tensor in lora.values())


def test_a_frozen_adapter_is_saved_loaded_exported_copied_and_merged(family, model, tmp_path):
    expected = evaluate(model, family.inputs())
    before = {name: param.clone() for name, param in model.named_parameters() if "base_layer" in name}
    hora_torch.freeze(model, "default")
    model.save_pretrained(tmp_path / "hora")
    hora_spec.load_adapter(tmp_path / "hora")
    for copied in (
        peft.PeftModel.from_pretrained(family.model(), tmp_path / "hora"),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        agree(evaluate(copied, family.inputs()), expected)
    hora_torch.export_lora(model, tmp_path / "lora")
    agree(evaluate(peft.PeftModel.from_pretrained(family.model(), tmp_path / "lora"), family.inputs()), expected)
    model.merge_adapter()
    agree(evaluate(model, family.inputs()), expected)
    model.unmerge_adapter()
    for name, param in model.named_parameters():
        assert name not in before or torch.equal(param, before[name])
    agree(evaluate(model.merge_and_unload(), family.inputs()), expected)


def test_freezing_leaves_the_other_adapter_as_it_is(family, model):
    model.add_adapter("other", config(seed=3))
    inputs = family.inputs()
    expected = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        expected[name] = evaluate(model, inputs)
    count = len(parameters(model, "other"))
    hora_torch.freeze(model, "default")
    agree(evaluate(model, inputs), expected["default"])
    model.set_adapter("other")
    assert torch.equal(evaluate(model, inputs), expected["other"])
    assert len(parameters(model, "other")) == count


def test_freezing_needs_a_known_adapter(model):
    with pytest.raises(HoraError, match="nobody"):
        hora_torch.freeze(model, "nobody")


def test_no_method_of_peft_trains_a_frozen_adapter(model):
    hora_torch.freeze(model)
    assert not any(param.requires_grad for param in model.parameters())
    model.add_adapter("other", config(seed=3))
    for name in ("other", "default"):
        model.set_adapter(name)
        assert {key for key, param in model.named_parameters() if param.requires_grad and "default" in key} == set()
    assert not any(param.requires_grad for param in model.parameters())


def test_an_adapter_that_diverged_is_not_frozen_and_stays_as_it_is(model):
    diverged = list(parameters(model, "default").values())[-1]
    with torch.no_grad():
        diverged.fill_(torch.nan)
    before = {key: param.isnan().any().item() for key, param in model.named_parameters()}
    with pytest.raises(HoraError, match="diverged"):
        hora_torch.freeze(model)
    assert {key: param.isnan().any().item() for key, param in model.named_parameters()} == before
