"""What torch offers to call, copy, trace and differentiate a module works on an adapted one, with the same numbers."""

import copy
import pickle

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .oracle import adapted, agree, config, current, differ, evaluate, output, parameters, truth

ROUTES = pytest.mark.parametrize("route", ["auto", "branch", "merge"])
# torch 2.13 writes its own rules of forward mode with torch.jit.script
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
FUNCTIONAL = pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "timm-vit"])


@pytest.fixture(autouse=True)
def _attention_that_torch_can_transform():
    """The fused kernel of the processor has neither batching rule nor forward mode (torch 2.13)."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def named(model):
    """Parameters of the hypernetworks as `functional_call` names them."""
    own = {id(param) for param in parameters(model).values()}
    return {name: param.detach() for name, param in model.named_parameters() if id(param) in own}


def call(model, params, inputs):
    return output(functional_call(model, params, (), dict(inputs)))


def scaled(params, factor):
    return {name: param * factor for name, param in params.items()}


def written(model, params):
    """A copy that holds these values."""
    other = copy.deepcopy(model)
    other.load_state_dict(params, strict=False)
    return other


@ROUTES
@FUNCTIONAL
def test_a_functional_call_computes_with_the_parameters_it_is_given(families, name, route):
    family = families[name]
    model = adapted(family, route=route)
    params = named(model)
    before = evaluate(model, family.inputs())
    for factor in (1.2, 0.7, 1.0):
        expected = truth(family, current(written(model, scaled(params, factor))))
        with torch.no_grad():
            agree(call(model, scaled(params, factor), family.inputs()), expected)
        agree(call(model, scaled(params, factor), family.inputs()).detach(), expected)
    assert torch.equal(evaluate(model, family.inputs()), before)


@ROUTES
@FUNCTIONAL
def test_vmap_over_stacked_adapters_is_a_loop_over_adapters(families, name, route):
    family = families[name]
    model = adapted(family, route=route)
    params = named(model)
    stacked = {name: torch.stack([param, param * 1.3, param * 0.5]) for name, param in params.items()}
    inputs = family.inputs()
    with torch.no_grad():
        together = vmap(lambda own: call(model, own, inputs))(stacked)
    for factor, found in zip((1.0, 1.3, 0.5), together, strict=True):
        agree(found, truth(family, current(written(model, scaled(params, factor)))))


def test_vmap_over_models_of_several_seeds_is_a_loop_over_models(families):
    family = families["llama"]
    torch.manual_seed(1)
    models = [adapted(family, seed=seed) for seed in range(3)]
    own, rest = {}, {}
    for key, value in stack_module_state(models)[0].items():
        (own if "hora_hyper" in key else rest)[key] = value.detach()
    shared = {key: value[0] for key, value in rest.items()}
    inputs = family.inputs()
    with torch.no_grad():
        together = vmap(lambda params: call(models[0], params | shared, inputs))(own)
    for model, found in zip(models, together, strict=True):
        agree(found, truth(family, current(model)))


def loss(model, inputs):
    return lambda params: call(model, params, inputs).square().sum()


@ROUTES
def test_gradients_of_a_functional_call_are_those_of_backward(families, route):
    family = families["llama"]
    model = adapted(family, route=route)
    found = grad(loss(model, family.inputs()))(named(model))
    output(model(**family.inputs())).square().sum().backward()
    expected = {name: param.grad for name, param in model.named_parameters() if name in found}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients_for_each_sample_are_those_of_a_loop(families):
    family = families["llama"]
    model, tokens = adapted(family), family.inputs()["input_ids"]

    def of(params, row):
        return loss(model, {"input_ids": row[None]})(params)

    together = vmap(grad(of), in_dims=(None, 0))(named(model), tokens)
    for i, row in enumerate(tokens):
        expected = grad(of)(named(model), row)
        torch.testing.assert_close({k: v[i] for k, v in together.items()}, expected, rtol=1e-4, atol=1e-5)


def directions(params):
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(param.shape, generator=generator) for name, param in params.items()}


@FORWARD_MODE
@ROUTES
@FUNCTIONAL
def test_forward_mode_is_the_transpose_of_backward_mode(families, name, route):
    family = families[name]
    model = adapted(family, route=route)
    params = named(model)
    towards, of = directions(params), loss(model, family.inputs())
    value, slope = jvp(of, (params,), (towards,))
    assert float(value) == pytest.approx(float(of(params)), rel=1e-5)
    expected = sum((g * towards[name]).sum() for name, g in grad(of)(params).items())
    assert float(slope) == pytest.approx(float(expected), rel=1e-3)


@FORWARD_MODE
def test_dual_numbers_pass_through_an_adapted_model(families):
    family = families["vit"]
    model = adapted(family)
    pixels = family.inputs()["pixel_values"]
    towards = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(4))
    with forward_ad.dual_level():
        result = output(model(pixel_values=forward_ad.make_dual(pixels, towards)))
        value, slope = (part.detach() for part in forward_ad.unpack_dual(result))
    asked = pixels.clone().requires_grad_()
    output(model(pixel_values=asked)).square().sum().backward()
    expected = (asked.grad * towards).sum()
    assert float((2 * value * slope).sum()) == pytest.approx(float(expected), rel=1e-3)


@FORWARD_MODE
def test_jacobians_of_both_modes_agree(families):
    family = families["vit"]
    model = adapted(family)
    name, param = next((name, param) for name, param in named(model).items() if "b_in" in name)
    rest = {key: value for key, value in named(model).items() if key != name}

    inputs = family.inputs()

    def of(value):
        return call(model, rest | {name: value}, inputs)

    torch.testing.assert_close(jacfwd(of)(param), jacrev(of)(param), rtol=1e-3, atol=1e-5)


class Outputs(torch.nn.Module):
    """A model from tensors to one tensor."""

    def __init__(self, model, inputs, **fixed):
        super().__init__()
        self.model, self.keys, self.fixed = model, tuple(inputs), fixed

    def forward(self, *values):
        return output(self.model(**dict(zip(self.keys, values, strict=True)), **self.fixed))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["vit", "timm-vit"])
def test_a_traced_model_computes_the_same(families, name):
    family = families[name]
    model, inputs = adapted(family), family.inputs()
    expected = evaluate(model, inputs)
    with torch.no_grad():
        traced = torch.jit.trace(Outputs(model, inputs), tuple(inputs.values()))
        agree(traced(*inputs.values()), expected)
        agree(traced(*(value.flip(0) for value in inputs.values())), expected.flip(0))


@pytest.mark.parametrize("name", ["llama", "vit", "timm-vit", "mha"])
def test_an_exported_program_computes_the_same(families, name):
    family = families[name]
    model, inputs = adapted(family), family.inputs()
    expected = evaluate(model, inputs)
    fixed = {"use_cache": False} if name == "llama" else {}
    with torch.no_grad():
        program = torch.export.export(Outputs(model.base_model.model, inputs, **fixed), tuple(inputs.values()))
    agree(program.module()(*inputs.values()), expected)


def test_a_compiled_model_sees_what_an_update_left(families):
    family = families["vit"]
    model = adapted(family)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = evaluate(model, family.inputs())
    agree(evaluate(compiled, family.inputs()), before)
    for param in parameters(model).values():
        param.data *= 1.2
    expected = truth(family, current(model))
    differ(before, expected)
    agree(evaluate(compiled, family.inputs()), expected)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("again", [copy.deepcopy, pickled], ids=lambda again: again.__name__)
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "timm-vit", "mha", "mha-cross"])
def test_a_copy_shares_nothing_with_its_source(families, name, again):
    family = families[name]
    model = adapted(family)
    expected = evaluate(model, family.inputs())
    other = again(model)
    assert torch.equal(evaluate(other, family.inputs()), expected)
    for param in parameters(other).values():
        param.data *= 1.2
    agree(evaluate(other, family.inputs()), truth(family, current(other)))
    assert torch.equal(evaluate(model, family.inputs()), expected)
    for param in parameters(model).values():
        param.data *= 0.7
    agree(evaluate(other, family.inputs()), truth(family, current(other)))
    output(other.train()(**family.inputs())).square().sum().backward()
    assert all(param.grad is None for param in model.parameters())


GENERATE = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def generated(model, inputs):
    mask = torch.ones_like(inputs["input_ids"])
    return model.generate(**inputs, attention_mask=mask, pad_token_id=0, **GENERATE)


def test_generation_inside_autocast_is_a_loop_of_calls_inside_autocast(families):
    family = families["llama"]
    model = adapted(family)
    full = generated(model, family.inputs()).logits[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = generated(model, family.inputs())
        tokens = result.sequences
        start = tokens.shape[1] - len(result.logits)
        for i, logits in enumerate(result.logits):
            expected = evaluate(model, {"input_ids": tokens[:, : start + i]})[:, -1]
            torch.testing.assert_close(logits, expected.float(), rtol=0.05, atol=0.02)
    assert not torch.equal(result.logits[0], full)
    assert torch.equal(generated(model, family.inputs()).logits[0], full)


@FORWARD_MODE
def test_two_active_adapters_go_through_every_transform(families):
    family = families["llama"]
    model = adapted(family)
    model.add_adapter("other", config(seed=3, r=3, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "other"])
    inputs = family.inputs()
    expected = evaluate(model, inputs)
    params = named(model) | {
        name: param.detach() for name, param in model.named_parameters() if "hora_hyper.other" in name
    }
    with torch.no_grad():
        together = vmap(lambda own: call(model, own, inputs))({k: torch.stack([v, v]) for k, v in params.items()})
    agree(together[0], expected)
    agree(together[1], expected)
    towards, of = directions(params), loss(model, inputs)
    slope = jvp(of, (params,), (towards,))[1]
    again = sum((g * towards[name]).sum() for name, g in grad(of)(params).items())
    assert float(slope) == pytest.approx(float(again), rel=1e-3)
