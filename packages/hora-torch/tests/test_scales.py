"""An adapter acts as strongly as somebody says, by PEFT's and diffusers' own ways."""

import copy

import hora_torch
import peft
import pytest
import torch
from hora_spec import HoraError
from hora_torch import HoraConfig
from hora_torch.layer import HoraLayer
from peft.helpers import rescale_adapter_scale
from torch import nn

SMALL = {"r": 2, "hidden_dim": 6, "head_embed_dim": 5, "init_weights": False}
CASES = ("llama", "gpt2", "mha")


@pytest.fixture(params=CASES)
def model(request, families):
    return peft.get_peft_model(families[request.param].model(), HoraConfig(**SMALL, hora_alpha=1.0)).eval()


@pytest.fixture
def run(request, model, families):
    inputs = families[request.node.callspec.params["model"]].inputs()

    def call():
        with torch.no_grad():
            result = model(**inputs)
        return result if isinstance(result, torch.Tensor) else result.logits

    return call


def layers(model):
    return [module for module in model.modules() if isinstance(module, HoraLayer)]


def deltas(model, name="default"):
    found = [layer.get_delta_weight(name) for layer in layers(model)]
    return [delta for entry in found for delta in (entry.values() if isinstance(entry, dict) else [entry])]


@pytest.mark.parametrize("scale", [0.0, -1.5, 0.25])
def test_a_scale_multiplies_the_delta_that_acts_merges_and_is_given_back(model, run, scale):
    expected, base = deltas(model), run()
    for layer in layers(model):
        layer.set_scale("default", scale)
    for delta, one in zip(deltas(model), expected, strict=True):
        torch.testing.assert_close(delta, scale * one, rtol=1e-5, atol=1e-6)
    scaled = run()
    assert not torch.allclose(scaled, base)
    model.merge_adapter()
    torch.testing.assert_close(run(), scaled, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    for layer in layers(model):
        layer.unscale_layer()
    assert torch.equal(run(), base)


def test_scaling_a_layer_is_undone_by_dividing_or_by_resetting(model, run):
    base = run()
    for undo in ({"scale": 2.0}, {}):
        for layer in layers(model):
            layer.scale_layer(2.0)
        assert not torch.allclose(run(), base)
        for layer in layers(model):
            layer.unscale_layer(**undo)
        assert torch.equal(run(), base)


def test_peft_s_context_rescales_hora(model, run):
    base = run()
    with rescale_adapter_scale(model, 0.0):
        without = run()
    with model.disable_adapter():
        torch.testing.assert_close(without, run(), rtol=1e-5, atol=1e-6)
    assert torch.equal(run(), base)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_scale_that_changes_inside_a_scope_is_seen(model, run):
    base = run()
    with hora_torch.cached_factors(model):
        assert torch.equal(run(), base)
        with rescale_adapter_scale(model, 0.5):
            assert not torch.allclose(run(), base)
        assert torch.equal(run(), base)


def test_a_merged_adapter_is_not_rescaled_in_vain(model):
    model.merge_adapter()
    for change in (lambda layer: layer.set_scale("default", 0.5), lambda layer: layer.scale_layer(2.0)):
        with pytest.raises(HoraError, match="while it is not merged"):
            change(layers(model)[0])
    layers(model)[0].set_scale("default", 1.0)  # what it is already


def test_one_of_two_adapters_is_scaled(model, run):
    model.add_adapter("other", HoraConfig(**SMALL))
    model.base_model.set_adapter(["default", "other"])
    both = deltas(model), deltas(model, "other")
    for layer in layers(model):
        layer.set_scale("other", 0.5)
    for one, two, before in zip(deltas(model), deltas(model, "other"), zip(*both, strict=True), strict=True):
        torch.testing.assert_close(one, before[0])
        torch.testing.assert_close(two, before[1] / 2)


def test_diffusers_way_of_weighing_adapters_works(model, run):
    """What ``set_adapters(names, weights)`` does to the model (diffusers 0.39)."""
    utils = pytest.importorskip("diffusers.utils.peft_utils", reason="diffusers is in the session integrations")
    utils.set_weights_and_activate_adapters(model, ["default"], [0.5])
    halved = run()
    utils.set_weights_and_activate_adapters(model, ["default"], [1.0])
    assert not torch.allclose(run(), halved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_is_a_finite_number(model, value):
    with pytest.raises(HoraError, match="finite"):
        layers(model)[0].set_scale("default", value)


def test_an_adapter_that_is_not_there_has_no_scale(model):
    before = dict(layers(model)[0].scaling)
    layers(model)[0].set_scale("absent", 2.0)
    assert layers(model)[0].scaling == before
    with pytest.raises(TypeError):
        layers(model)[0].scaling["default"] = 2.0


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_files_and_exports_are_of_the_adapter_as_it_was_trained_or_say_so(model, tmp_path):
    layers(model)[0].set_scale("default", 0.5)
    with pytest.raises(HoraError, match=r"0\.5 times its scale"):
        hora_torch.export_lora(model, tmp_path / "lora")
    with pytest.warns(UserWarning, match="which is not saved"):
        model.save_pretrained(tmp_path / "hora")


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_deleted_adapter_takes_its_scale_along(model):
    layers(model)[0].set_scale("default", 0.5)
    model.delete_adapter("default")
    model.add_adapter("default", HoraConfig(**SMALL, hora_alpha=1.0))
    assert layers(model)[0].scaling == {"default": 0.5}  # alpha over r


def test_scales_survive_copies():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), HoraConfig(**SMALL, target_modules=["0"], num_heads=2))
    layers(model)[0].set_scale("default", 0.5)
    twin = copy.deepcopy(model)
    layers(twin)[0].set_scale("default", 2.0)
    assert layers(model)[0].scaling == {"default": 0.5}
