"""Generation as a module of a model: whatever surrounds the call, the factors are those of its float32 parameters."""

import peft
import pytest
import torch
from hora_spec import AdapterSpec, HoraError, LayerShape, init_params
from hora_torch import HoraConfig
from hora_torch.hypernet import HoraHypernet
from torch import nn
from torch.nn.utils import parametrize

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


FULL = LayerShape.attention(32, 4, num_kv_heads=2)


def made(spec=SPECS["shared"], **kwargs):
    return HoraHypernet(spec, FULL, name="x", **kwargs)


def test_parameters_are_those_of_seed_0_in_float32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        params = made().params()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {param.dtype for param in params.values()} == {torch.float32}
    for key, value in init_params(SPECS["shared"], FULL, 0, "x").items():
        assert torch.equal(params[key], torch.from_numpy(value)), key


@pytest.mark.parametrize("spec", [SPECS["shared"], SPECS["shared"].replace(residual=True)], ids=str)
def test_randomizing_moves_what_starts_at_zero_alone(spec):
    start, hypernet = made(spec).params(), made(spec)
    hypernet.randomize()
    for key, param in hypernet.params().items():
        assert torch.equal(param, start[key]) == bool(start[key].any()), key


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_parameters_in_sixteen_bits_generate_in_float32(dtype):
    narrow = made().to(dtype)
    wide = made()
    with torch.no_grad():
        for key, param in wide.params().items():
            param.copy_(narrow.params()[key])
    torch.testing.assert_close(narrow(), wide(), rtol=0, atol=0)


def test_factors_without_gradients_are_values_of_their_own():
    hypernet = made()
    with torch.no_grad():
        a = hypernet()["q"].a
        before = a.clone()
        hypernet.params()["a.q"].add_(1)
    assert torch.equal(a, before)


@pytest.mark.parametrize("hooked", [("a",), ("", "a")], ids=["bank", "both"])
def test_factors_of_a_hooked_module_are_values_of_their_own_with_gradients(hooked):
    hypernet = made()
    for name in hooked:
        hypernet.get_submodule(name).register_forward_hook(lambda module, args, output: None)
    factors = hypernet()
    assert factors["q"].a.data_ptr() != hypernet.params()["a.q"].data_ptr()
    (grad,) = torch.autograd.grad(factors["q"].a.sum(), hypernet.params()["a.q"])
    assert (grad == 1).all()


def test_awaited_values_are_asked_for_as_far_as_they_are_used_and_once():
    hypernet, values = made(), made().params()
    hypernet.await_values(needed=True)
    with pytest.raises(HoraError, match="were not loaded"):
        hypernet(["q"])
    with torch.no_grad():
        for key, param in hypernet.params().items():
            if not key.endswith(".v"):
                param.copy_(values[key])
    torch.testing.assert_close(hypernet(["q"]), made()(["q"]), rtol=0, atol=0)
    with pytest.raises(HoraError, match=r"\['a\.v', 'b_out\.v'\]"):
        hypernet(["v"])
    with torch.no_grad():
        hypernet.params()["a.q"].fill_(torch.nan)  # from now on that of a training that diverged
    assert hypernet(["q"])["q"].a.isnan().all()


def test_awaited_values_that_may_come_later_are_those_of_the_start_until_then():
    hypernet = made()
    hypernet.await_values(needed=False)
    with pytest.warns(UserWarning, match="it starts anew"):
        torch.testing.assert_close(hypernet(), made()(), rtol=0, atol=0)
    torch.testing.assert_close(hypernet(), made()(), rtol=0, atol=0)  # says so once


@pytest.mark.parametrize(
    ("spec", "apart"),
    [
        *((spec, True) for spec in SPECS.values()),
        *((spec.replace(gain=3.0), True) for spec in SPECS.values()),
        (SPECS["generated a"].replace(residual=True, gain=3.0), False),
        (SPECS["generated a"].replace(sharing="a", gain=3.0), True),
        (AdapterSpec(3, sharing="none"), False),
    ],
    ids=str,
)
def test_factors_without_the_gain_need_it_once_in_their_product(spec, apart):
    hypernet = made(spec)
    hypernet.randomize()
    bare = hypernet(gained=False)
    for projection, (a, b) in hypernet().items():
        torch.testing.assert_close(hypernet.gain * bare[projection].b @ bare[projection].a, b @ a)
    assert (hypernet.gain != 1) == apart


def offload(hypernet):
    hypernet.to("meta")


def partition(hypernet):  # as DeepSpeed leaves it between calls
    hypernet.a.q.data = torch.empty(0)


def shard(hypernet):  # as a subclass of Parameter does
    hypernet.a.q = type("Sharded", (nn.Parameter,), {})(hypernet.a.q)


def register(hypernet):
    parametrize.register_parametrization(hypernet.a, "q", nn.Tanh())


def hook(hypernet):
    hypernet.a.register_forward_hook(print)


def wait(hypernet):
    hypernet.await_values(needed=False)


@pytest.mark.parametrize("change", [offload, partition, shard, register, hook, wait])
def test_parameters_that_a_call_brings_or_changes_are_not_at_hand_before_it(change):
    hypernet = made()
    assert hypernet.at_hand
    change(hypernet)
    assert not hypernet.at_hand


@pytest.mark.parametrize("spec", [*SPECS.values(), AdapterSpec(3, a_source="fixed")], ids=str)
def test_registered_parameters_are_those_of_the_spec_or_unknown(spec):
    hypernet = made(spec)
    assert {id(param) for param in hypernet.registered()} == {id(param) for param in hypernet.params().values()}
    parametrize.register_parametrization(hypernet.b_out, "q", nn.Identity())
    assert hypernet.registered() is None
