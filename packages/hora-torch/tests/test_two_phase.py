"""What is refused changes nothing: not one layer, not one bit, not one name."""

import peft
import pytest
import torch
from hora_spec import HoraError
from hora_torch.layer import HoraLayer

from .oracle import adapted, agree, assert_unchanged, config, evaluate, parameters, snapshot


@pytest.fixture
def family(families):
    return families["llama"]


def diverged(model):
    """The second layer has factors that are not finite."""
    parameters(model)["model.layers.1.self_attn.q_proj.hora_hyper.b_in"].data[0, 0] = torch.nan


def overflowing(model):
    """The second layer leaves the range of its weights, which alone are in 16 bits."""
    model.base_model.model.model.layers[1].self_attn.half()
    parameters(model)["model.layers.1.self_attn.q_proj.hora_hyper.a.v"].data *= 1e12


def coded(model):
    """The second layer holds integer codes."""
    layer = model.base_model.model.model.layers[1].self_attn.v_proj.base_layer
    layer.weight = torch.nn.Parameter((layer.weight * 100).to(torch.int8), requires_grad=False)


REASONS = [diverged, overflowing, coded]
SAFE = pytest.mark.parametrize("safe_merge", [False, True], ids=["quick", "safe"])


@SAFE
@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: reason.__name__)
def test_a_merge_refused_in_the_second_layer_leaves_the_first_alone(family, reason, safe_merge):
    model = adapted(family)
    reason(model)
    before = snapshot(model)
    with pytest.raises(HoraError):
        model.merge_adapter(safe_merge=safe_merge)
    assert_unchanged(model, before)


@SAFE
@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: reason.__name__)
def test_a_refused_unload_leaves_the_adapted_model(family, reason, safe_merge):
    model = adapted(family)
    reason(model)
    before = snapshot(model)
    with pytest.raises(HoraError):
        model.merge_and_unload(safe_merge=safe_merge)
    assert_unchanged(model, before)


def test_a_model_that_was_not_unloaded_works(family):
    model = adapted(family)
    expected = evaluate(model, family.inputs())
    entry = parameters(model)["model.layers.1.self_attn.q_proj.hora_hyper.b_in"]
    good = entry.detach().clone()
    entry.data[0, 0] = torch.inf
    with pytest.raises(HoraError):
        model.merge_and_unload()
    entry.data.copy_(good)
    assert torch.equal(evaluate(model, family.inputs()), expected)
    agree(evaluate(model.merge_and_unload(), family.inputs()), expected)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
def test_a_second_merge_that_is_refused_leaves_the_first(family):
    model = adapted(family)
    model.add_adapter("other", config(seed=3))
    model.eval().merge_adapter(["default"])
    key = "model.layers.1.self_attn.q_proj.hora_hyper.b_in"
    parameters(model, "other")[key].data[0, 0] = torch.nan
    before = snapshot(model)
    for names in (["other"], ["default", "other"]):
        with pytest.raises(HoraError):
            model.merge_adapter(names)
        assert_unchanged(model, before)
    model.unmerge_adapter()
    expected = evaluate(adapted(family), family.inputs())
    assert torch.equal(evaluate(model, family.inputs()), expected)


def test_trained_rows_of_embeddings_are_merged_with_the_layers_or_not_at_all(family):
    model = adapted(family, trainable_token_indices=[1, 3])
    wrapper = model.get_input_embeddings()
    wrapper.token_adapter.trainable_tokens_delta["default"].data += 0.5
    expected = evaluate(model, family.inputs())
    before = snapshot(model)
    model.merge_adapter()
    assert wrapper.token_adapter.merged
    agree(evaluate(model, family.inputs()), expected)
    model.unmerge_adapter()
    assert_unchanged(model, before)
    diverged(model)
    before = snapshot(model)
    with pytest.raises(HoraError):
        model.merge_adapter()
    assert not wrapper.token_adapter.merged
    assert_unchanged(model, before)


BAD = {
    "heads that do not divide": {"num_heads": 5},
    "ranks that differ in a layer": {"rank_pattern": {"layers.1.self_attn.q_proj": 5}},
    "no such module": {"target_modules": ["nothing"]},
    "a module that cannot be adapted": {"target_modules": ["q_proj", "input_layernorm"]},
}


def bad(name):
    return config(**BAD[name])


@pytest.mark.parametrize("name", BAD)
def test_a_config_that_does_not_fit_leaves_the_base(family, name):
    for start in (
        lambda model: peft.get_peft_model(model, bad(name)),
        lambda model: peft.inject_adapter_in_model(bad(name), model, "mine"),
        lambda model: model.add_adapter(bad(name), "mine"),
    ):
        base = family.model()
        before = snapshot(base)
        with pytest.raises(HoraError):
            start(base)
        assert_unchanged(base, before)


@pytest.mark.parametrize("name", BAD)
def test_a_second_config_that_does_not_fit_leaves_the_first(family, name):
    model = adapted(family)
    before = snapshot(model)
    with pytest.raises(HoraError):
        model.add_adapter("other", bad(name))
    assert_unchanged(model, before)
    model.add_adapter("other", config())
    assert sorted(model.peft_config) == ["default", "other"]


def test_an_unmerge_refused_in_the_last_layer_leaves_the_first_merged(family):
    model = adapted(family)
    model.merge_adapter()
    first, *_, last = (module for module in model.modules() if isinstance(module, HoraLayer))
    merged = last.base_layer.weight.detach().clone()
    with torch.no_grad():
        last.base_layer.weight[0, 0] += 1
    before = snapshot(model)
    with pytest.raises(HoraError, match="opposite order"):
        model.unmerge_adapter()
    assert_unchanged(model, before)
    assert first.merged
    with torch.no_grad():
        last.base_layer.weight.copy_(merged)
    model.unmerge_adapter()
    assert not any(module.merged for module in (first, last))
