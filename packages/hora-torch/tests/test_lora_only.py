"""What of PEFT knows LoRA by its names refuses HoRA, and still does for LoRA what it did."""

import inspect

import hora_torch
import peft
import pytest
import torch
from hora_spec import HoraError
from hora_torch import lora_only
from peft.optimizers import lorafa, loraplus
from peft.utils import PeftType, hotswap
from torch import nn

from .test_verify import Bypass, small

LORA = {"r": 2, "target_modules": ["v_proj"], "init_lora_weights": False}


def with_hora():
    return peft.get_peft_model(nn.Sequential(Bypass()), small())


def with_lora():
    return peft.get_peft_model(nn.Sequential(Bypass()), peft.LoraConfig(**LORA))


EXCHANGED = {
    "get_parameter_names": loraplus.get_parameter_names,
    "__init__": lorafa.LoraFAOptimizer.__init__,
    "hotswap_adapter_from_state_dict": hotswap.hotswap_adapter_from_state_dict,
}


@pytest.mark.parametrize("name", EXCHANGED)
def test_what_is_exchanged_still_has_its_name_and_its_arguments(name):
    function = EXCHANGED[name]
    assert function.__module__.startswith("hora_torch") is False
    assert function.__name__ == name
    assert inspect.signature(function) == inspect.signature(inspect.unwrap(function))


def test_hora_is_made_known_once():
    before = loraplus.get_parameter_names, peft.helpers.LoraLayer, hotswap.CONFIG_KEYS_TO_CHECK[PeftType.HORA]
    lora_only.install()
    after = loraplus.get_parameter_names, peft.helpers.LoraLayer, hotswap.CONFIG_KEYS_TO_CHECK[PeftType.HORA]
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_an_optimizer_that_tells_a_and_b_by_their_names_is_for_lora_alone():
    create = peft.optimizers.create_loraplus_optimizer
    settings = {"optimizer_cls": torch.optim.AdamW, "lr": 1e-3, "loraplus_lr_ratio": 16}
    with pytest.raises(HoraError, match=r"create_loraplus_optimizer knows lora_A and lora_B.*param_groups"):
        create(with_hora(), **settings)
    rates = {group["lr"] for group in create(with_lora(), **settings).param_groups if group["params"]}
    assert rates == {1e-3, 16e-3}


def test_an_optimizer_that_freezes_what_is_called_a_is_for_lora_alone():
    create, settings = peft.optimizers.create_lorafa_optimizer, {"r": 2, "lora_alpha": 2, "lr": 1e-3}
    with pytest.raises(HoraError, match=r"freezes what is called lora_A.*param_groups"):
        create(with_hora(), **settings)
    model = with_lora()
    optimizer = create(model, **settings)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    before = {name: param.detach().clone() for name, param in model.named_parameters() if "lora_" in name}
    for name, param in model.named_parameters():
        if "lora_B" in name:
            param.grad = torch.ones_like(param)
    optimizer.step()
    moved = {
        name for name, param in model.named_parameters() if "lora_" in name and not torch.equal(param, before[name])
    }
    assert moved == {name for name in before if "lora_B" in name}
    plain = nn.Linear(2, 2)
    assert lorafa.LoraFAOptimizer([{"params": [*plain.parameters()], "scaling_factor": 1.0}]).param_groups
    assert lorafa.LoraFAOptimizer(plain.parameters()).param_groups


@pytest.mark.parametrize("make", [with_hora, with_lora])
def test_values_are_swapped_by_the_adapter_s_own_way(make, tmp_path):
    make().save_pretrained(tmp_path)
    torch.manual_seed(7)
    model, other = make(), peft.PeftModel.from_pretrained(nn.Sequential(Bypass()), tmp_path)
    kept = [param for name, param in model.named_parameters() if "lora_" in name or "hora_hyper" in name]
    hotswap.hotswap_adapter(model, str(tmp_path), "default")
    found = peft.get_peft_model_state_dict(model)
    assert found.keys() == (expected := peft.get_peft_model_state_dict(other)).keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert all(any(one is param for param in model.parameters()) for one in kept)


@pytest.mark.parametrize("make", [with_hora, with_lora])
def test_a_scale_is_changed_for_a_while_in_layers_of_both(make):
    model = make().eval()
    x = torch.randn(1, 5, 8)
    before = model(x)
    with peft.helpers.rescale_adapter_scale(model, multiplier=0.5):
        assert not torch.allclose(model(x), before)
    assert torch.equal(model(x), before)


def test_hora_torch_is_what_makes_it_known():
    assert hora_torch.lora_only is lora_only
