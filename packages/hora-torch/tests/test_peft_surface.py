"""The rest of what PEFT's users call: it answers truly, or refuses HoRA by name."""

import json

import hora_torch
import peft
import pytest
import torch
import transformers as tf
from hora_spec import HoraError
from hora_torch import HoraConfig
from peft.helpers import check_if_peft_model, disable_input_dtype_casting, update_forward_signature
from torch import nn

from .conftest import TEXT

SMALL = {"r": 2, "hidden_dim": 6, "head_embed_dim": 5, "init_weights": False}


@pytest.fixture
def llama(families):
    return families["llama"]


def adapted(family, **kwargs):
    return peft.get_peft_model(family.model(), HoraConfig(**SMALL | kwargs)).eval()


def deep(layers):
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT | {"num_hidden_layers": layers}))


def test_the_status_of_layers_and_model_is_what_it_is(llama):
    model = adapted(llama)
    model.add_adapter("narrow", HoraConfig(**SMALL, target_modules=["v_proj"]))
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        status = peft.get_model_status(model)
        assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "HoraModel")
        assert (status.enabled, status.active_adapters) == (True, ["default"])
        assert status.merged_adapters == (["default"] if merged else [])
        assert status.available_adapters == ["default", "narrow"]
        assert status.requires_grad == {"default": True, "narrow": False}
        assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
        layers = {layer.name: layer for layer in peft.get_layer_status(model)}
        assert sorted(layers) == sorted(f"model.model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv")
        values = layers["model.model.layers.0.self_attn.v_proj"]
        assert values.available_adapters == ["default", "narrow"]
        assert values.module_type == "hora.HoraLinear"
    model.unmerge_adapter()
    model.disable_adapter_layers()
    assert peft.get_model_status(model).enabled is False


def test_gradients_are_switched_for_one_adapter(llama):
    model = adapted(llama)
    model.set_requires_grad("default", False)
    assert not any(param.requires_grad for param in model.parameters())
    model.set_requires_grad("default")
    assert all(param.requires_grad == ("hora_hyper" in name) for name, param in model.named_parameters())


def test_the_status_of_an_adapter_that_was_deleted_is_gone(llama):
    model = adapted(llama)
    model.add_adapter("other", HoraConfig(**SMALL))
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert peft.get_model_status(model).available_adapters == ["other"]
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("default")


def test_merging_shows_its_progress(llama, capsys):
    adapted(llama).merge_and_unload(progressbar=True)
    assert "Unloading and merging model" in capsys.readouterr().err


def test_hora_is_no_part_of_a_mixed_model_and_peft_says_so(llama):
    with pytest.raises(ValueError, match="'HORA' is not compatible with the `PeftMixedModel`"):
        peft.get_peft_model(llama.model(), HoraConfig(**SMALL), mixed=True)


def test_helpers_of_peft_take_hora(llama, tmp_path):
    model = adapted(llama)
    model.save_pretrained(tmp_path)
    assert check_if_peft_model(str(tmp_path))
    update_forward_signature(model)
    with disable_input_dtype_casting(model), torch.no_grad():
        assert model(**llama.inputs()).logits.isfinite().all()


def test_a_base_in_another_dtype_is_adapted_by_peft_s_casting_rules(llama):
    model = peft.get_peft_model(llama.model().bfloat16(), HoraConfig(**SMALL), autocast_adapter_dtype=False)
    assert {param.dtype for name, param in model.named_parameters() if "hora" in name} == {torch.bfloat16}


@pytest.mark.parametrize("layers", [1, 3])
def test_a_saved_config_is_no_template_for_another_depth_until_it_is_made_one(llama, tmp_path, layers):
    adapted(llama).save_pretrained(tmp_path)
    with pytest.raises(HoraError, match="set its hora_layers to None"):
        peft.get_peft_model(deep(layers), HoraConfig.from_pretrained(tmp_path))
    path = tmp_path / "adapter_config.json"
    template = json.loads(path.read_text()) | {"hora_layers": None, "hora_layers_sha256": None}
    (tmp_path / "template").mkdir()
    (tmp_path / "template" / path.name).write_text(json.dumps(template))
    model = peft.get_peft_model(deep(layers), HoraConfig.from_pretrained(tmp_path / "template"))
    assert len(hora_torch.to_adapter(model).layers) == layers


@pytest.mark.parametrize("target", ["embed", "norm"])
def test_modules_that_are_no_linear_maps_are_refused_by_name(target):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(4, 4), nn.LayerNorm(4)

    with pytest.raises(HoraError, match=f"got {type(getattr(Model(), target)).__name__} at '{target}'"):
        peft.get_peft_model(Model(), HoraConfig(**SMALL, target_modules=[target]))


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_the_head_of_a_task_is_trained_whole_by_itself(families, tmp_path, task):
    family = families["bert"]
    model = peft.get_peft_model(family.model(), HoraConfig(**SMALL, task_type=task)).eval()
    assert any("classifier.modules_to_save.default" in name for name, param in model.named_parameters())
    model.save_pretrained(tmp_path)
    other = peft.PeftModel.from_pretrained(family.model(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(other(**family.inputs()).logits, model(**family.inputs()).logits)
