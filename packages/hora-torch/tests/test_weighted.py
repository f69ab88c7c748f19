"""``add_weighted_adapter``: exact sums, or a refusal by name."""

import hora_torch
import peft
import pytest
import torch
from hora_spec import HoraError
from hora_torch import HoraConfig

from .oracle import assert_unchanged, snapshot

SMALL = {"r": 2, "hidden_dim": 6, "head_embed_dim": 5, "init_weights": False}
OTHERS = {
    "another rank and alpha": {"r": 3, "hora_alpha": 4.0},
    "A per head": {"sharing": "none"},
    "A generated": {"a_source": "hypernetwork", "residual": True},
    "fewer targets": {"target_modules": ["v_proj"]},
    "one layer": {"target_modules": r".*layers\.1\.self_attn\.[qv]_proj"},
}


def adapted(family, **kwargs):
    return peft.get_peft_model(family.model(), HoraConfig(**SMALL | kwargs)).eval()


def output(model, inputs):
    with torch.no_grad():
        result = model(**inputs)
    return result if isinstance(result, torch.Tensor) else result.logits


def weighted(model, inputs, weights):
    """What the adapters do together at those scales: the long way round."""
    model.base_model.set_adapter(list(weights))
    for layer in model.modules():
        if isinstance(layer, hora_torch.HoraLayer):
            for name, weight in weights.items():
                layer.set_scale(name, weight)
    result = output(model, inputs)
    for layer in model.modules():
        if isinstance(layer, hora_torch.HoraLayer):
            layer.unscale_layer()
    return result


@pytest.mark.parametrize("other", OTHERS)
def test_a_sum_acts_merges_saves_and_exports_as_its_terms_do_together(families, tmp_path, other):
    family = families["llama"]
    inputs, model = family.inputs(), adapted(family)
    model.add_adapter("other", HoraConfig(**SMALL | OTHERS[other]))
    weights = {"default": 0.5, "other": -1.25}
    expected = weighted(model, inputs, weights)
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    model.set_adapter("sum")
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(output(model, inputs), expected, **close)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    hora_torch.export_lora(model, tmp_path / "lora", adapter_name="sum")
    for directory in ("sum", "lora"):
        loaded = peft.PeftModel.from_pretrained(family.model(), tmp_path / directory).eval()
        torch.testing.assert_close(output(loaded, inputs), expected, **close)
    model.merge_adapter(["sum"])
    torch.testing.assert_close(output(model, inputs), expected, **close)


@pytest.mark.parametrize("name", ["gpt2", "timm-vit", "mha", "t5"])
def test_sums_of_other_kinds_of_modules(families, name):
    family = families[name]
    inputs, model = family.inputs(), adapted(family)
    model.add_adapter("other", HoraConfig(**SMALL | {"r": 1}))
    weights = {"other": 2.0, "default": 0.5}
    expected = weighted(model, inputs, weights)
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_sum_has_the_heads_that_its_terms_were_told(families):
    told = {"target_modules": ["linear1"], "num_heads": 2}
    model = peft.get_peft_model(families["mha"].model().encoder, HoraConfig(**SMALL, **told))
    model.add_weighted_adapter(["default"], [2.0], "sum")
    layers = [module for module in model.modules() if isinstance(module, hora_torch.HoraLayer)]
    assert len(layers) == 2
    for layer in layers:
        assert layer.hora_attached["sum"].sites == layer.hora_attached["default"].sites
        torch.testing.assert_close(layer.get_delta_weight("sum"), 2 * layer.get_delta_weight("default"))


def test_a_sum_is_of_the_same_base_and_task(families):
    base = families["llama"].model()
    base.name_or_path = "a/base"
    model = peft.get_peft_model(base, HoraConfig(**SMALL, task_type="CAUSAL_LM"))
    model.add_weighted_adapter(["default"], [2.0], "sum")
    for key in ("base_model_name_or_path", "task_type"):
        assert getattr(model.peft_config["sum"], key) == getattr(model.peft_config["default"], key) is not None


def test_a_sum_that_cannot_be_injected_leaves_no_config(families, monkeypatch):
    model = adapted(families["llama"])

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model.base_model), "inject_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.add_weighted_adapter(["default"], [2.0], "sum")
    assert list(model.peft_config) == ["default"]


def test_a_sum_is_not_trained_and_leaves_the_active_adapter(families):
    model = adapted(families["llama"])
    before = {name for name, param in model.named_parameters() if param.requires_grad}
    model.add_weighted_adapter(["default"], [2.0], "sum")
    assert {name for name, param in model.named_parameters() if param.requires_grad} == before
    assert model.active_adapter == "default"
    model.set_adapter("sum")
    assert not any(param.requires_grad for param in model.parameters())


def test_a_weight_is_made_the_adapter_s_own(families):
    family = families["llama"]
    inputs, model = family.inputs(), adapted(family)
    expected = weighted(model, inputs, {"default": 0.3})
    model.add_weighted_adapter(["default"], [0.3], "weaker")
    model.set_adapter("weaker")
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((["default"], [1.0], "sum"), {"combination_type": "svd"}, "combination_type='cat', got 'svd'"),
        ((["default"], [1.0], "sum"), {"svd_rank": 2}, "combination_type='cat'"),
        ((["default"], [1.0], "default"), {}, "a new adapter"),
        ((["absent"], [1.0], "sum"), {}, "adapter_name is one of"),
        ((["default"], [1.0, 2.0], "sum"), {}, "finite weight"),
        ((["default"], [float("inf")], "sum"), {}, "finite weight"),
        ((["default", "heads"], [1.0, 1.0], "sum"), {}, "agree on rows and heads"),
        ((["saved"], [1.0], "sum"), {}, "trained whole"),
    ],
)
def test_what_has_no_exact_sum_is_refused_and_nothing_changes(families, args, kwargs, message):
    base = families["mha"].model().encoder
    first = {"target_modules": ["linear1"]}
    model = peft.get_peft_model(base, HoraConfig(**SMALL, num_heads=2, **first))
    model.add_adapter("heads", HoraConfig(**SMALL, num_heads=4, **first))
    model.add_adapter("saved", HoraConfig(**SMALL, num_heads=2, modules_to_save=["linear2"], **first))
    before = snapshot(model)
    with pytest.raises(HoraError, match=message):
        model.add_weighted_adapter(*args, **kwargs)
    assert_unchanged(model, before)
