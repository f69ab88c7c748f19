"""What is taken out of a model: the named adapter, whole, as it was trained, and LoRA of the same."""

import json

import accelerate
import hora_torch
import numpy as np
import peft
import pytest
import torch
from hora_spec import HoraError
from hora_torch.export import adapter_in, adapter_name_of, rescaled
from hora_torch.layer import HoraLayer
from safetensors.numpy import load_file
from torch import nn

from .test_verify import Bypass, small

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def adapted(*, names=("default",), **kwargs):
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(Bypass(), Bypass()), small(**kwargs), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, small(**kwargs))
    return model


def numbers(adapter):
    return {(name, key): value for name, layer in adapter.layers.items() for key, value in layer.params.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key])


def parameters(model, name="default"):
    """By layer and key, straight from the hypernetworks."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, HoraLayer) and name in layer.hora_hyper:
            own = path.removeprefix("base_model.model.").partition(".")[0]
            found |= {(own, key): param.detach() for key, param in layer.hora_hyper[name].params().items()}
    return found


def test_an_adapter_is_taken_out_with_its_own_values():
    model = adapted(names=("one", "two"))
    taken = {name: hora_torch.to_adapter(model, name) for name in ("one", "two")}
    for name, adapter in taken.items():
        assert_same(numbers(adapter), {key: param.numpy() for key, param in parameters(model, name).items()})
        assert not adapter.modules
    assert not np.array_equal(*(numbers(adapter)["0", "b_out.q"] for adapter in taken.values()))
    assert taken["one"].config["r"] == 2
    assert "hora_layers" not in taken["one"].config


def test_an_adapter_is_named_where_there_are_several():
    model = adapted(names=("one", "two"))
    assert adapter_name_of(adapted(), None) == "default"
    assert adapter_name_of(model, "two") == "two"
    for name in (None, "three"):
        with pytest.raises(HoraError, match=r"one of \['one', 'two'\], got"):
            adapter_name_of(model, name)
    with pytest.raises(HoraError, match=r"one of \[\], got None"):
        adapter_name_of(nn.Linear(2, 2), None)


def test_an_adapter_that_acts_at_another_scale_is_not_taken_out():
    model = adapted(names=("one", "two"))
    assert rescaled(model, "one") == ""
    *_, last = (layer for layer in model.modules() if isinstance(layer, HoraLayer))
    last.set_scale("one", 3.0)
    assert rescaled(model, "one") == "3 times its scale in 'base_model.model.1.v_proj'"
    assert rescaled(model, "two") == ""
    with pytest.raises(HoraError, match="'one' acts at 3 times its scale"):
        hora_torch.to_adapter(model, "one")
    assert hora_torch.to_adapter(model, "two").layers
    last.set_scale("one", 1.0)
    assert hora_torch.to_adapter(model, "one").layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_of_any_dtype_are_taken_out_in_single_precision(dtype):
    model = adapted().to(dtype)
    found = numbers(hora_torch.to_adapter(model))
    assert {value.dtype for value in found.values()} == {np.dtype("float32")}
    assert_same(found, {key: param.float().numpy() for key, param in parameters(model).items()})


def test_modules_that_are_trained_whole_come_along_as_they_are():
    model = adapted(modules_to_save=["1.k_proj"]).to(torch.float64)
    found = hora_torch.to_adapter(model).modules
    own = model.base_model.model[1].k_proj.modules_to_save["default"]
    assert_same(found, {f"1.k_proj.{name}": value.detach().numpy() for name, value in own.named_parameters()})
    bias = hora_torch.to_adapter(adapted(bias="all")).modules
    assert {key.rpartition(".")[2] for key in bias} == {"bias"}


def test_embeddings_come_along_as_peft_decides_or_stay(monkeypatch):
    asked, model = [], adapted()
    real = hora_torch.export.get_peft_model_state_dict
    spy = lambda *args, **kwargs: asked.append(kwargs["save_embedding_layers"]) or real(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(hora_torch.export, "get_peft_model_state_dict", spy)
    for take in (hora_torch.to_adapter, adapter_in):
        assert take(model, None).layers
    assert adapter_in(model, None, embeddings=False).layers
    assert asked == ["auto", "auto", False]


def test_an_offloaded_adapter_is_taken_out_whole():
    model = adapted()
    expected = numbers(hora_torch.to_adapter(model))
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert all(param.is_meta for param in parameters(model).values())
    assert_same(numbers(hora_torch.to_adapter(model)), expected)


def test_what_is_not_here_is_refused(monkeypatch):
    model = adapted(modules_to_save=["1.k_proj"])
    own = model.base_model.model[1].k_proj.modules_to_save["default"]
    own.weight = nn.Parameter(own.weight.to("meta"))
    with pytest.raises(HoraError, match=r"are in memory, .*k_proj.*weight is offloaded"):
        hora_torch.to_adapter(model)
    monkeypatch.setattr(hora_torch.export, "is_sharded", lambda tensor: tensor.ndim == 2)
    with pytest.raises(HoraError, match=r"are whole, .*is sharded"):
        hora_torch.to_adapter(adapted())


def exported(path, model, **kwargs):
    hora_torch.export_lora(model, path, **kwargs)
    return json.loads((path / CONFIG).read_text()), load_file(path / TENSORS)


def test_an_export_is_of_the_named_adapter_in_the_dtype_and_form_that_are_asked_for(tmp_path):
    model = adapted(names=("one", "two"), rank_pattern={"0.*": 3})
    config, tensors = exported(tmp_path / "plain", model, adapter_name="one")
    assert {value.dtype for value in tensors.values()} == {np.dtype("float32")}
    other = exported(tmp_path / "other", model, adapter_name="two")[1]
    assert any(not np.array_equal(value, other[key]) for key, value in tensors.items())
    half = exported(tmp_path / "half", model, adapter_name="one", dtype=np.float16)[1]
    assert {value.dtype for value in half.values()} == {np.dtype("float16")}
    compact, smaller = exported(tmp_path / "compact", model, adapter_name="one", compact=True)
    assert_same(exported(tmp_path / "whole", model, adapter_name="one", compact=False)[1], tensors)
    assert not config.get("rank_pattern")
    assert compact["rank_pattern"]
    assert sum(value.size for value in smaller.values()) < sum(value.size for value in tensors.values())


def test_an_export_is_checked_for_its_server(tmp_path):
    model = adapted(bias="all")
    exported(tmp_path / "any", model)
    with pytest.raises(HoraError, match="vllm takes no such LoRA adapter: it loads no biases"):
        hora_torch.export_lora(model, tmp_path / "vllm", for_server="vllm")


def convolution(groups):
    base = nn.Sequential(nn.Conv1d(6, 8, 1, groups=groups))
    return peft.get_peft_model(base, small(target_modules=["0"]))


def test_a_convolution_of_several_groups_is_no_lora(tmp_path):
    assert exported(tmp_path / "one", convolution(1))[1]
    with pytest.raises(HoraError, match=r"no convolution whose groups have one A in common, got 'base_model.model.0'"):
        hora_torch.export_lora(convolution(2), tmp_path / "two")
