"""What an adapted module does when it is asked directly, as PEFT's and other libraries' code asks it."""

import contextlib
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from hora_spec import HoraError
from hora_torch import HoraConfig, cached_factors
from hora_torch.layer import HoraLayer, warn_of_rounding
from hora_torch.quantized import Rounding
from torch import nn
from transformers.pytorch_utils import Conv1D

HEADS = 2


class Attention(nn.Module):
    """Two maps that share a hypernetwork; the second is a follower of the first."""

    def __init__(self, make=nn.Linear):
        super().__init__()
        self.num_heads, self.q_proj, self.v_proj = HEADS, make(6, 8), make(6, 8)

    def forward(self, x):
        return self.q_proj(x) + self.v_proj(x)


def adapted(base=None, **kwargs):
    torch.manual_seed(0)
    options = {"r": 2, "num_heads": HEADS, "target_modules": ["q_proj", "v_proj"], "init_weights": False}
    return peft.get_peft_model(base or Attention(), HoraConfig(**options | kwargs))


def layers(model):
    return [module for module in model.modules() if isinstance(module, HoraLayer)]


@pytest.mark.parametrize("make", [nn.Linear, lambda rows, columns: Conv1D(columns, rows)], ids=["linear", "conv1d"])
def test_it_has_the_features_of_its_base(make):
    assert [(layer.in_features, layer.out_features) for layer in layers(adapted(Attention(make)))] == [(6, 8)] * 2


def test_seeds_are_starts_of_their_own():
    starts = [layers(adapted(seed=seed))[0].hypernet("default").params()["head_embed"] for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("inside", [False, True])
def test_dropout_without_gradients_is_that_with_them(inside):
    """As for an uncertainty of many passes; what is kept for the scope is not that of another rate."""
    model, x = adapted(hora_dropout=0.5).train(), torch.randn(3, 6)

    def run():
        torch.manual_seed(1)
        return model(x).detach()

    expected = run()
    with torch.no_grad(), cached_factors(model) if inside else warnings.catch_warnings():
        torch.testing.assert_close([run(), run()], [expected, expected])
        model.eval()
        whole = run()
        model.train()
        torch.testing.assert_close(run(), expected)
    assert not torch.allclose(whole, expected)


def test_a_follower_in_a_replica_of_dataparallel_says_that_it_cannot_know_its_leader():
    leader, follower = layers(adapted())
    for layer in leader, follower:
        layer.__dict__["_is_replica"] = True
    assert leader(torch.ones(1, 6)).isfinite().all()
    with pytest.raises(HoraError, match="one process per device"):
        follower(torch.ones(1, 6))


@pytest.mark.parametrize("merge", [HoraLayer.merge, HoraLayer.merge_silently])
def test_it_looks_at_every_entry_of_its_base_only_where_that_is_asked_for(merge):
    for safe in False, True:
        layer = layers(adapted())[0]
        with torch.no_grad():
            layer.base_layer.weight[0, 0] = torch.inf
        if safe:
            with pytest.raises(HoraError, match="not finite"):
                merge(layer, safe)
        else:
            merge(layer)
        assert layer.merged is not safe


def test_it_goes_back_to_what_was_merged_before():
    model = adapted()
    model.add_adapter("other", HoraConfig(r=1, num_heads=HEADS, target_modules=["q_proj"], init_weights=False))
    layer = layers(model)[0]
    base = layer.base_layer.weight.clone()
    layer.merge(adapter_names=["other"])
    before = layer.base_layer.weight.clone()
    with pytest.warns(UserWarning, match="additionally merging default"):
        layer.merge(adapter_names=["default"])
    layer.restore_merged(["other"])
    assert layer.merged_adapters == ["other"]
    assert torch.equal(layer.base_layer.weight, before)
    layer.restore_merged([])
    assert not layer.merged
    assert torch.equal(layer.base_layer.weight, base)


def test_a_merge_of_no_adapter_is_none():
    layer = layers(adapted())[0]
    assert not layer.merge_silently(adapter_names=[])
    assert not layer.merged


@pytest.mark.parametrize("lost", [False, True])
def test_a_merge_says_what_rounding_lost_if_any_was(lost, monkeypatch):
    layer = layers(adapted())[0]
    layer.rounding["weight"] = Rounding(weight=0.5, delta=0.1)
    monkeypatch.setattr(layer, "merge_silently", lambda safe_merge, names: lost)
    with pytest.warns(UserWarning, match="10% of the update") if lost else contextlib.nullcontext():
        layer.merge()


def test_the_rounding_that_is_told_is_that_of_the_update_that_lost_most():
    lost = {"one": Rounding(weight=0.5, delta=0.1), "other": Rounding(weight=0.1, delta=0.9)}
    found = {name: SimpleNamespace(rounding={"weight": rounding}) for name, rounding in lost.items()}
    with pytest.warns(UserWarning, match=r"90% of the update .*\(other\)"):
        warn_of_rounding(found, stacklevel=1)


@pytest.mark.parametrize("runs_on", ["meta", None])
def test_a_hypernetwork_lives_where_its_offloaded_base_runs(runs_on):
    base = Attention().to("meta")
    for projection in base.children():
        projection._hf_hook = SimpleNamespace(execution_device=runs_on)
    assert {param.device.type for param in adapted(base).parameters() if param.requires_grad} == {runs_on or "cpu"}


def test_it_is_converted_to_lora_by_peft():
    model, x = adapted(), torch.randn(3, 6)
    assert model.supports_lora_conversion()
    config, tensors = peft.convert_to_lora(model, rank=2)
    assert config.r == 2
    expected = model(x)
    lora = peft.get_peft_model(model.unload(), config)
    peft.set_peft_model_state_dict(lora, tensors)
    torch.testing.assert_close(lora(x), expected)


def test_nothing_is_cast_to_the_precision_of_a_base_that_peft_is_told_to_leave():
    model, x = adapted(), torch.randn(3, 6)
    expected = model(x)
    assert all(layer.cast_input_dtype_enabled for layer in layers(model))
    with peft.helpers.disable_input_dtype_casting(model):
        assert torch.equal(model(x), expected)
