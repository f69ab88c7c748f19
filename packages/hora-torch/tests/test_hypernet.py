"""Generation as a module of a model: whatever surrounds the call, the factors are those of its float32 parameters."""

import peft
import pytest
import torch
from hora_spec import AdapterSpec, LayerShape
from hora_torch import HoraConfig
from hora_torch.hypernet import HoraHypernet
from torch import nn

SPECS = {
    "shared": AdapterSpec(3, hidden_dim=6, head_embed_dim=5),
    "generated a": AdapterSpec(3, hidden_dim=6, head_embed_dim=5, a_source="hypernetwork", activation="gelu"),
}
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_factors_and_their_gradients_inside_autocast_are_those_outside(spec, dtype):
    def run(**autocast):
        torch.manual_seed(0)
        hypernet = HoraHypernet(spec, LayerShape.attention(32, 4, num_kv_heads=2), name="x")
        hypernet.randomize()
        with torch.autocast("cpu", dtype, **autocast):
            made = [factor for pair in hypernet().values() for factor in pair]
        return made, torch.autograd.grad(sum(factor.sin().sum() for factor in made), list(hypernet.parameters()))

    expected, inside = run(enabled=False), run()
    assert {factor.dtype for factor in inside[0]} == {torch.float32}
    torch.testing.assert_close(inside, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("sharing", ["full", "none"])
def test_a_merge_inside_autocast_is_the_merge_outside(sharing, dtype):
    def merged():
        torch.manual_seed(0)
        config = HoraConfig(r=2, target_modules=["0"], num_heads=4, sharing=sharing, init_weights=False)
        return peft.get_peft_model(nn.Sequential(nn.Linear(32, 32)), config).merge_and_unload()[0].weight

    expected = merged()
    with torch.autocast("cpu", dtype):
        inside = merged()
    assert torch.equal(inside, expected)
