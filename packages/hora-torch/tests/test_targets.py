"""Which modules of which models are adapted, and that adapting them means what the mathematics says."""

import copy

import hora_torch
import peft
import pytest
import torch
from hora_spec import HoraError
from hora_torch import HoraConfig, HoraModel
from hora_torch.layer import HoraLayer
from hora_torch.targets import base_module
from torch import nn


def output(model, inputs, grad=False):
    """The one tensor that stands for a model's answer."""
    with torch.set_grad_enabled(grad):
        result = model(**inputs)
    if isinstance(result, torch.Tensor):
        return result
    return next(
        getattr(result, key) for key in ("logits", "logits_per_image", "last_hidden_state") if hasattr(result, key)
    )


def adapted(family, **kwargs):
    config = HoraConfig(**({"r": 2, "hidden_dim": 6, "head_embed_dim": 5} | kwargs))
    return peft.get_peft_model(family.model(), config)


def test_query_and_value_of_every_attention_are_found(family):
    model = adapted(family)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, HoraLayer)}
    assert names == set(family.modules)
    projections = model.peft_config["default"].hora_layers[0]["projections"]
    assert {p: site["num_heads"] for p, site in projections.items()} == family.heads


def test_a_new_adapter_changes_nothing(family):
    inputs = family.inputs()
    expected = output(family.model(), inputs)
    torch.testing.assert_close(output(adapted(family).eval(), inputs), expected, rtol=1e-5, atol=1e-6)


def test_the_adapted_model_is_the_base_with_delta_in_its_weights(family):
    """The delta is put into the base by hand, through the layouts that the config records."""
    inputs = family.inputs()
    model = adapted(family, init_weights=False, hora_alpha=1.0).eval()
    actual = output(model, inputs)
    base = family.model()
    by_hand = copy.deepcopy(base)
    layers = {name: module for name, module in model.base_model.model.named_modules() if isinstance(module, HoraLayer)}
    touched = 0
    for layer in model.peft_config["default"].hora_layers:
        hypernet = layers[layer["leader"]].hora_hyper["default"]
        for p, site in layer["projections"].items():
            with torch.no_grad():
                a, b = hypernet([p])[p]
                delta = (b @ a).flatten(0, 1) * 0.5  # alpha / r
            weight = getattr(by_hand.get_submodule(site["module"]), site["parameter"]).data
            view = weight.T if site["layout"]["pattern"].startswith("d") else weight
            _, start, stop, blocks = [*(site["layout"]["window"] or (0, 0, view.shape[0])), 1][:4]
            view.unflatten(0, (blocks, -1))[:, start:stop] += delta.unflatten(0, (blocks, -1))
            touched += 1
    assert touched == 2 * len(model.peft_config["default"].hora_layers)
    torch.testing.assert_close(actual, output(by_hand, inputs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(actual, output(base, inputs), rtol=1e-3, atol=1e-4)


def test_gradients_reach_every_adapter_parameter_and_no_other(family):
    model = adapted(family, init_weights=False).train()
    output(model, family.inputs(), grad=True).square().sum().backward()
    for name, param in model.named_parameters():
        assert (param.grad is not None and param.grad.abs().sum() > 0) == ("hora_hyper" in name), name


def test_merged_unloaded_and_disabled_models_agree_with_the_adapted_and_the_base(family):
    inputs = family.inputs()
    base = family.model()
    expected_base = output(base, inputs)
    model = adapted(family, init_weights=False).eval()
    expected = output(model, inputs)
    with model.disable_adapter():
        torch.testing.assert_close(output(model, inputs), expected_base, rtol=1e-6, atol=1e-6)
    merged = model.merge_and_unload()
    torch.testing.assert_close(output(merged, inputs), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, HoraLayer) for module in merged.modules())
    unloaded = adapted(family, init_weights=False).eval().unload()
    assert torch.equal(output(unloaded, inputs), expected_base)


def test_merging_and_unmerging_restores_every_bit(family):
    model = adapted(family, init_weights=False)
    before = {name: param.clone() for name, param in model.named_parameters()}
    model.merge_adapter(safe_merge=True)
    changed = [name for name, param in model.named_parameters() if not torch.equal(param, before[name])]
    assert changed
    assert all("base_layer" in name for name in changed)
    model.unmerge_adapter()
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_saved_adapters_load_into_a_fresh_base(family, tmp_path):
    """Parameters come back bit for bit; outputs may differ in the last ones, as BLAS sums by memory alignment."""
    inputs = family.inputs()
    model = adapted(family, init_weights=False).eval()
    expected = output(model, inputs)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = peft.PeftModel.from_pretrained(family.model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        torch.testing.assert_close(output(loaded.eval(), inputs), expected, rtol=1e-5, atol=1e-6)
        for (name, one), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
            assert torch.equal(one, other), name


def test_only_the_chosen_parts_of_a_fused_weight_are_adapted(families):
    model = adapted(families["timm-vit"], fused_projections=("k",), init_weights=False)
    delta = model.base_model.model.blocks[0].attn.qkv.get_delta_weight("default")
    q, k, v = delta.chunk(3)
    assert not q.any()
    assert k.any()
    assert not v.any()


def test_explicit_head_counts_make_any_linear_a_target(families):
    model = adapted(families["llama"], target_modules=["q_proj", "o_proj"], num_heads={"o_proj": 8, "q_proj": 4})
    projections = model.peft_config["default"].hora_layers[0]["projections"]
    assert {p: site["num_heads"] for p, site in projections.items()} == {"q": 4, "o_proj": 8}
    everything = adapted(families["llama"], target_modules="all-linear", num_heads=4)
    assert len(everything.peft_config["default"].hora_layers) == 4  # self_attn and mlp of two blocks


def test_heads_that_do_not_divide_are_an_error(families):
    with pytest.raises(HoraError, match="divide"):
        adapted(families["llama"], num_heads=5)


def test_the_output_projection_of_a_multihead_attention_is_refused(families):
    with pytest.raises(HoraError, match="target the MultiheadAttention"):
        adapted(families["mha"], target_modules=["out_proj"], num_heads=1)


def test_targets_at_the_root_and_with_odd_names_share_one_layer():
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)),
        HoraConfig(r=2, target_modules=["0", "2"], num_heads=2, init_weights=False),
    )
    assert isinstance(model.base_model, HoraModel)
    (layer,) = model.peft_config["default"].hora_layers
    assert (layer["name"], sorted(layer["projections"])) == (".", ["_0", "_2"])
    assert model(torch.ones(3, 6)).shape == (3, 4)


def test_timm_eva_is_left_as_it_was(families):
    """Its forward multiplies with the weight past the module, unless told to add the bias apart."""
    model = adapted(families["timm-eva"])
    attention = model.base_model.model.blocks[0].attn
    assert attention.qkv_bias_separate
    assert not model.unload().blocks[0].attn.qkv_bias_separate
    assert type(base_module(attention.qkv)) is nn.Linear


def test_queries_that_are_keys_are_adapted_where_they_are_named():
    """Reformer's hashing attention makes queries and keys of the same rows."""
    import transformers

    config = transformers.ReformerConfig(
        attn_layers=["lsh"], num_attention_heads=2, attention_head_size=8, hidden_size=16
    )
    model = transformers.models.reformer.modeling_reformer.LSHSelfAttention(config)
    (layer,) = hora_torch.plan(model, HoraConfig(target_modules=["query_key", "value"])).layers
    assert {p: site.projection.num_heads for p, site in layer.sites.items()} == {"qk": 2, "v": 2}
    left_out = hora_torch.plan(model, HoraConfig()).left_out
    assert "keys that are queries or values" in left_out["."]
