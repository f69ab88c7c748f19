"""A map without heads has one, and is a layer of its own (spec S3, S4): MLPs, output projections, ``all-linear``."""

import hora_spec
import hora_torch
import peft
import pytest
import torch
from hora_spec import HoraError
from hora_torch import HoraConfig
from torch import nn

from .oracle import agree, current, differ, evaluate, output, truth

SMALL = {"r": 2, "hidden_dim": 6, "head_embed_dim": 5, "init_weights": False}


def adapted(family, **kwargs):
    return peft.get_peft_model(family.model(), HoraConfig(**SMALL | kwargs)).eval()


def described(model):
    return {
        layer["name"]: {p: site["num_heads"] for p, site in layer["projections"].items()}
        for layer in model.peft_config["default"].hora_layers
    }


ALL_LINEAR = ("llama", "gpt2-cross", "phi3", "bert", "t5", "vit", "timm-vit", "timm-eva", "mha", "mha-cross")


@pytest.mark.parametrize("name", ALL_LINEAR)
def test_all_linear_works_out_of_the_box(families, tmp_path, name):
    family = families[name]
    inputs, model = family.inputs(), adapted(family, target_modules="all-linear")
    expected = evaluate(model, inputs)
    differ(expected, evaluate(family.model(), inputs))
    agree(expected, truth(family, current(model)))
    output(model.train()(**inputs)).square().sum().backward()
    assert all(param.grad is not None for key, param in model.named_parameters() if "hora_hyper" in key)
    model.eval().save_pretrained(tmp_path)
    agree(evaluate(peft.PeftModel.from_pretrained(family.model(), tmp_path), inputs), expected)
    agree(evaluate(model.merge_and_unload(), inputs), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_all_linear_exports_to_lora(families, tmp_path, name):
    family = families[name]
    model = adapted(family, target_modules="all-linear")
    hora_torch.export_lora(model, tmp_path)
    lora = peft.PeftModel.from_pretrained(family.model(), tmp_path)
    agree(evaluate(lora, family.inputs()), evaluate(model, family.inputs()))


def test_all_linear_of_a_decoder_is_heads_together_and_the_rest_alone(families):
    found = described(adapted(families["llama"], target_modules="all-linear"))
    own = {name.removeprefix("model.layers.0."): heads for name, heads in found.items() if ".0." in name}
    assert own == {
        "self_attn": {"k": 2, "q": 4, "v": 2},
        "self_attn.o_proj": {"o_proj": 1},
        **{f"mlp.{name}": {name: 1} for name in ("gate_proj", "up_proj", "down_proj")},
    }
    assert not any("lm_head" in name for name in found)


def test_the_rest_leaves_the_start_of_the_heads_as_it_was(families):
    one = hora_torch.to_adapter(adapted(families["llama"])).layers["model.layers.0.self_attn"]
    both = adapted(families["llama"], target_modules=["q_proj", "v_proj", "o_proj", "up_proj"])
    other = hora_torch.to_adapter(both).layers["model.layers.0.self_attn"]
    assert one.spec == other.spec
    for key in ("head_embed", "b_in", "a.q", "a.v"):
        assert (one.params[key] == other.params[key]).all()


def test_each_map_has_a_rank_of_its_own(families):
    model = adapted(families["llama"], target_modules=["up_proj", "down_proj"], rank_pattern={"mlp.up_proj": 3})
    ranks = {name.rpartition(".")[2]: layer.spec.rank for name, layer in hora_torch.to_adapter(model).layers.items()}
    assert ranks == {"up_proj": 3, "down_proj": 2}


def test_heads_that_somebody_says_are_heads(families):
    model = adapted(families["llama"], target_modules=["q_proj", "o_proj", "up_proj"], num_heads={"o_proj": 8})
    found = described(model)
    assert found["model.layers.0.self_attn"] == {"o_proj": 8, "q": 4}
    assert found["model.layers.0.mlp.up_proj"] == {"up_proj": 1}


def test_a_query_is_no_map_without_heads(families):
    """A role whose heads are not known stays an error: one head would be a guess."""
    with pytest.raises(HoraError, match="the head count"):
        peft.get_peft_model(nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), HoraConfig(**SMALL, target_modules=["q_proj"]))


def test_fused_rows_of_an_unknown_order_are_left_out_of_all_linear_and_named(families):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj, self.num_heads = nn.Linear(4, 12), nn.Linear(4, 4), 2

        def forward(self, x):
            return self.proj(self.qkv(x)[..., :4])

    config = HoraConfig(**SMALL, target_modules="all-linear")
    plan = hora_torch.plan(nn.Sequential(Attention()), config)
    assert [layer.name for layer in plan.layers] == ["0.proj"]
    assert "order of fused rows" in plan.left_out["0"]
    assert "adapts 0 of 1 attention modules, and 1 maps without heads" in str(plan)
    with pytest.warns(UserWarning, match="HoRA adapts 0 of 1"):
        model = peft.get_peft_model(nn.Sequential(Attention()), config)
    assert model.peft_config["default"].target_modules == {"proj"}


def test_a_plan_of_maps_without_heads_says_so(families):
    plan = hora_torch.plan(families["llama"].model(), HoraConfig(**SMALL, target_modules=["up_proj"]))
    assert "a map without heads has one" in str(plan)
    assert "1 heads x 48" in str(plan)


def test_a_sum_and_the_reference_know_maps_without_heads(families, tmp_path):
    model = adapted(families["llama"], target_modules=["up_proj", "o_proj"])
    model.add_weighted_adapter(["default"], [2.0], "sum")
    model.save_pretrained(tmp_path)
    layers = [hora_spec.load_adapter(path).layers for path in (tmp_path, tmp_path / "sum")]
    for name, layer in layers[0].items():
        one, two = (hora_spec.reference.delta(x[name].spec, x[name].shape, x[name].params) for x in layers)
        for p in layer.sites:
            torch.testing.assert_close(torch.tensor(two[p]), 2 * torch.tensor(one[p]), rtol=1e-5, atol=1e-6)


def test_blocks_of_an_output_projection_are_said_to_be_no_heads_of_the_attention(families):
    plan = hora_torch.plan(
        families["llama"].model(), HoraConfig(r=2, target_modules=["q_proj", "o_proj"], num_heads={"o_proj": 8})
    )
    assert "blocks of output rows, which are heads of no attention" in plan.layers[0].sources["o_proj"]
    assert "blocks of output rows" not in plan.layers[0].sources["q"]


def first_step(width, along_input, seed):
    """How far the first step of Adam at rate one moves an output, in a map of `width` by `width` and rank 8."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = torch.randn(2, width, generator=generator)
    a = (2 * torch.rand(8, width, generator=generator) - 1) / width**0.5
    after, before = a.T @ (torch.outer(a @ grad, x).sign() @ x), torch.outer(grad, a @ x).sign() @ (a @ x)
    return float((after if along_input else before).square().mean().sqrt())  # of a^T b x, or b a x


@pytest.mark.parametrize(("along_input", "growth"), [(False, 1.0), (True, 4.0)])
def test_heads_along_the_input_would_move_the_first_step_with_the_width(along_input, growth):
    small, large = (sum(first_step(width, along_input, seed) for seed in range(40)) for width in (64, 1024))
    assert abs(large / small / growth - 1) < 0.2
