"""Adapters on disk: PEFT's directory is the specification's directory, in both directions, and LoRA of the same."""

import json

import hora_spec
import hora_torch
import numpy as np
import peft
import pytest
import torch
import transformers
from hora_spec import HoraError
from hora_torch import HoraConfig
from safetensors.torch import load_file, save_file

SMALL = {"r": 2, "hidden_dim": 6, "head_embed_dim": 5, "init_weights": False}


def logits(model, inputs):
    with torch.no_grad():
        result = model.eval()(**inputs)
    return result if isinstance(result, torch.Tensor) else result.logits


def adapted(family, **kwargs):
    return peft.get_peft_model(family.model(), HoraConfig(**SMALL | kwargs))


EXPORTED = ["llama", "gemma", "phi3", "gpt2", "gpt2-cross", "bert", "t5", "vit", "timm-vit", "timm-eva-separate"]


@pytest.mark.parametrize("name", [*EXPORTED, "mha-cross"])
def test_what_peft_saves_the_specification_reads(families, name, tmp_path):
    family = families[name]
    model = adapted(family)
    model.save_pretrained(tmp_path)
    adapter = hora_spec.load_adapter(tmp_path)
    assert [layer["name"] for layer in model.peft_config["default"].hora_layers] == list(adapter.layers)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(len(layer.params) for layer in adapter.layers.values()) == len(tensors)
    again = hora_torch.to_adapter(model)
    for layer_name, layer in adapter.layers.items():
        assert layer.spec == again.layers[layer_name].spec
        for key, value in layer.params.items():
            np.testing.assert_array_equal(again.layers[layer_name].params[key], value)


def test_both_writers_write_the_same_bytes(families, tmp_path):
    model = adapted(families["llama"])
    model.save_pretrained(tmp_path / "peft")
    hora_spec.save_adapter(tmp_path / "spec", hora_spec.load_adapter(tmp_path / "peft"))
    one, other = ((tmp_path / writer / "adapter_model.safetensors").read_bytes() for writer in ("peft", "spec"))
    assert one == other


@pytest.mark.parametrize("name", ["llama", "gpt2", "timm-vit", "mha"])
@pytest.mark.parametrize("keep_config", [True, False], ids=["config", "no-config"])
def test_what_the_specification_saves_peft_loads(families, name, keep_config, tmp_path):
    family = families[name]
    model = adapted(family, rank_pattern={".*0.*": 3} if name == "llama" else {})
    expected = logits(model, family.inputs())
    adapter = hora_torch.to_adapter(model)
    if not keep_config:  # as from a writer that knows no PEFT config
        adapter = hora_spec.Adapter(adapter.layers)
    hora_spec.save_adapter(tmp_path, adapter)
    loaded = peft.PeftModel.from_pretrained(family.model(), tmp_path)
    torch.testing.assert_close(logits(loaded, family.inputs()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*EXPORTED, "timm-vit-none", "gpt2-b"])
def test_an_exported_lora_computes_the_same(families, name, tmp_path):
    name, _, sharing = name.partition("-") if name.endswith(("-none", "-b")) else (name, "", "full")
    if sharing not in ("full", "b", "none"):
        name, sharing = f"{name}-vit", "none"
    family = families[name]
    model = adapted(family, hora_alpha=3.0, sharing=sharing)
    expected = logits(model, family.inputs())
    hora_torch.export_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    lora = peft.PeftModel.from_pretrained(family.model(), tmp_path)
    torch.testing.assert_close(logits(lora, family.inputs()), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(family.model(), family.inputs()), rtol=1e-3, atol=1e-4)


def test_an_exported_lora_of_a_multihead_attention_computes_the_same(families, tmp_path):
    """In training mode: in evaluation torch's encoder layer goes past PEFT's LoRA (0.21), though not past HoRA."""
    family = families["mha"]
    model = adapted(family)
    expected = model.train()(**family.inputs()).detach()
    hora_torch.export_lora(model, tmp_path)
    lora = peft.PeftModel.from_pretrained(family.model(), tmp_path).train()
    torch.testing.assert_close(lora(**family.inputs()).detach(), expected, rtol=1e-4, atol=1e-5)


def test_modules_to_save_travel_with_the_adapter_and_the_export(families, tmp_path):
    family = families["vit"]
    model = adapted(family, modules_to_save=["classifier"])
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.mul_(2)
    expected = logits(model, family.inputs())
    model.save_pretrained(tmp_path / "hora")
    assert sorted(hora_spec.load_adapter(tmp_path / "hora").modules) == ["classifier.bias", "classifier.weight"]
    loaded = peft.PeftModel.from_pretrained(family.model(), tmp_path / "hora")
    torch.testing.assert_close(logits(loaded, family.inputs()), expected, rtol=1e-5, atol=1e-6)
    hora_torch.export_lora(model, tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(family.model(), tmp_path / "lora")
    torch.testing.assert_close(logits(lora, family.inputs()), expected, rtol=1e-4, atol=1e-5)


def test_exporting_needs_a_known_adapter(families, tmp_path):
    model = adapted(families["llama"])
    with pytest.raises(HoraError, match="default"):
        hora_torch.export_lora(model, tmp_path, adapter_name="other")


def test_embeddings_that_were_resized_are_taken_out_as_peft_saves_them(families, tmp_path):
    families["llama"].model().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(base.config.vocab_size + 3)
    model = peft.get_peft_model(base, HoraConfig(**SMALL))
    with pytest.warns(UserWarning, match="has been resized"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.warns(UserWarning, match="has been resized"):
        adapter = hora_torch.to_adapter(model)
    with pytest.warns(UserWarning, match="has been resized"):
        hora_torch.export_lora(model, tmp_path / "lora")
    stored = hora_spec.load_adapter(tmp_path / "saved").modules
    assert adapter.modules.keys() == stored.keys() != set()
    exported = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, value in stored.items():
        np.testing.assert_array_equal(adapter.modules[name], value)
        np.testing.assert_array_equal(exported[f"base_model.model.{name}"], value)
    model.base_model.add_weighted_adapter(["default"], [1.0], "sum")


def saved(families, path):
    """As from a writer that knows no digests, so that the checks behind them are seen."""
    adapted(families["llama"]).save_pretrained(path)
    config = json.loads((path / "adapter_config.json").read_text())
    del config["hora_tensors_sha256"], config["hora_layers_sha256"]
    (path / "adapter_config.json").write_text(json.dumps(config))
    file = path / "adapter_model.safetensors"
    return file, load_file(file)


def load(families, path):
    return peft.PeftModel.from_pretrained(families["llama"].model(), path)


def test_a_missing_tensor_is_refused(families, tmp_path):
    file, tensors = saved(families, tmp_path)
    del tensors[next(key for key in tensors if key.endswith("b_in"))]
    save_file(tensors, file)
    with pytest.raises(HoraError, match="b_in"):
        load(families, tmp_path)


def test_an_extra_tensor_is_refused(families, tmp_path):
    file, tensors = saved(families, tmp_path)
    key = next(key for key in tensors if key.endswith("b_in"))
    tensors[key.replace("b_in", "b_inn")] = tensors[key].clone()
    save_file(tensors, file)
    with pytest.raises(HoraError, match="b_inn"):
        load(families, tmp_path)


def test_a_wrong_shape_is_refused(families, tmp_path):
    file, tensors = saved(families, tmp_path)
    key = next(key for key in tensors if key.endswith("b_in"))
    tensors[key] = tensors[key].T.contiguous()
    save_file(tensors, file)
    with pytest.raises(HoraError, match="b_in must have shape"):
        load(families, tmp_path)


def test_a_non_finite_tensor_is_refused(families, tmp_path):
    file, tensors = saved(families, tmp_path)
    tensors[next(key for key in tensors if key.endswith("b_in"))][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(HoraError, match="finite"):
        load(families, tmp_path)


def test_integers_are_no_parameters(families, tmp_path):
    file, tensors = saved(families, tmp_path)
    key = next(key for key in tensors if key.endswith("b_in"))
    for dtype in (torch.int32, torch.uint32):
        save_file(tensors | {key: tensors[key].view(dtype)}, file)
        with pytest.raises(HoraError, match="b_in must be floating, got"):
            load(families, tmp_path)


def test_nan_in_a_module_trained_whole_is_refused(families, tmp_path):
    model = adapted(families["vit"], modules_to_save=["classifier"])
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].bias[0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(HoraError, match=r"NaN in classifier\.bias"):
        peft.PeftModel.from_pretrained(families["vit"].model(), tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"layout": {"pattern": "d (h k)", "window": None}}),
        ("llama", {"layout": {"pattern": "(h k) d", "window": [1, 0, 32]}}),
        ("llama", {"parameter": "bias"}),
        ("llama", {"parameter": "forward"}),
        ("mha", {"parameter": "forward"}),
        ("mha", {"parameter": "training"}),
        ("mha", {"parameter": "out_proj"}),
        ("mha", {"parameter": "weight"}),
        ("mha", {"parameter": "q_proj_weight"}),
    ],
    ids=str,
)
def test_a_place_that_the_module_does_not_have_is_refused(families, name, change, tmp_path):
    """The weight of q in the LLaMA is square, so that its shape tells nothing."""
    adapted(families[name]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["hora_tensors_sha256"], config["hora_layers_sha256"]
    for layer in config["hora_layers"]:
        layer["projections"]["q"].update(change)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(HoraError, match="load the base model"):
        peft.PeftModel.from_pretrained(families[name].model(), tmp_path)


def test_another_spec_version_is_refused(families, tmp_path):
    saved(families, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"hora_spec_version": 1', '"hora_spec_version": 2'))
    with pytest.raises(HoraError, match="version"):
        load(families, tmp_path)


def test_another_base_model_is_refused(families, tmp_path):
    saved(families, tmp_path)
    with pytest.raises(HoraError, match="base model"):
        peft.PeftModel.from_pretrained(families["gemma"].model(), tmp_path)
    with pytest.raises(HoraError, match="base model"):
        peft.PeftModel.from_pretrained(families["bert"].model(), tmp_path)


def test_a_changed_config_of_a_loaded_adapter_is_refused(families, tmp_path):
    saved(families, tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    config.r = 5
    with pytest.raises(HoraError, match="write a new HoraConfig"):
        peft.get_peft_model(families["llama"].model(), config)


def test_equal_adapters_write_equal_configs(families, tmp_path):
    for name in ("a", "b"):
        adapted(families["llama"], target_modules=["v_proj", "q_proj"]).save_pretrained(tmp_path / name)
    one, other = ((tmp_path / name / "adapter_config.json").read_bytes() for name in ("a", "b"))
    assert one == other
