"""Weights that compute by themselves and that nobody knows: their own forward plus a branch; a merge that is real, or
refused. Those that are known are in `test_quantized.py`.
"""

import warnings
from dataclasses import replace
from importlib.util import find_spec

import peft
import pytest
import torch
import transformers as tf
from hora_spec import HoraError
from hora_torch.layer import HoraLayer
from torch import nn

from .conftest import TEXT
from .oracle import adapted, config, differ, evaluate, output, parameters


def optional(name):
    """A library of quantised weights, or a skip."""
    if find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"{name} is optional: one of the libraries whose weights are adapted")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that look for accelerators
        return pytest.importorskip(name, reason=f"{name} needs more than this machine has", exc_type=ImportError)


class Codes(torch.Tensor):
    """Integer codes and a scale per row that know one operation, the linear map."""

    @staticmethod
    def __new__(cls, weight):
        made = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, requires_grad=False)
        made.scale = weight.abs().amax(1, keepdim=True) / 127
        made.codes = (weight / made.scale).round().to(torch.int8)
        return made

    def dequantize(self):
        return self.codes * self.scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.dequantize(), *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"Codes know no {func}")


def projections(model):
    """Parent, name and module of every linear map of an attention or a feed-forward."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name.endswith("proj"):
                yield parent, name, child


def codes(model):
    for _, _, linear in projections(model):
        linear.weight = nn.Parameter(Codes(linear.weight.detach()), requires_grad=False)


def quanto(model):
    library = optional("optimum.quanto")
    library.quantize(model, weights=library.qint8, include="*proj")


BASES = {"own": codes, "quanto, not frozen": quanto}


@pytest.fixture
def family(families):
    """Rows of 64, the least that four bits are packed in."""
    sizes = TEXT | {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
    return replace(families["llama"], build=lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)))


@pytest.fixture(params=BASES)
def kind(request):
    return request.param


def quantised(family, kind):
    model = family.model()
    BASES[kind](model)
    return model


def weight_in_floats(linear):
    """What a quantised linear map multiplies with, found by multiplying."""
    with torch.no_grad():
        return linear(torch.eye(linear.in_features)).T.clone()


def reference(family, base, model):
    """The same adapter on plain weights of the values that `base` has."""
    plain = family.model()
    for name, module in plain.named_modules():
        if name.endswith("proj"):
            module.weight.data = weight_in_floats(base.get_submodule(name)).float()
    plain = peft.get_peft_model(plain, config())
    for one, other in zip(parameters(plain).values(), parameters(model).values(), strict=True):
        one.data = other.detach().clone()
    return plain


def adapt(family, kind):
    """Adapted quantised model and its reference."""
    base, again = quantised(family, kind), quantised(family, kind)
    model = peft.get_peft_model(base, config())
    return model, reference(family, again, model)


def gradients(model, inputs):
    model.zero_grad()
    output(model.train()(**inputs)).square().sum().backward()
    return {name: param.grad.clone() for name, param in parameters(model).items()}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_the_base_keeps_its_own_forward(family, kind):
    model, plain = adapt(family, kind)
    inputs = family.inputs()
    close(evaluate(model, inputs), evaluate(plain, inputs))
    with model.disable_adapter():
        assert torch.equal(evaluate(model, inputs), evaluate(quantised(family, kind), inputs))


def test_gradients_are_those_on_the_dequantised_weight(family, kind):
    model, plain = adapt(family, kind)
    found, expected = gradients(model, family.inputs()), gradients(plain, family.inputs())
    for name, grad in found.items():
        assert torch.isfinite(grad).all(), name
        close(grad, expected[name])


def assert_merged_or_refused(act, model, inputs, expected, plain):
    """Whether `act` merged; then the output is the adapted one, as far as the base's own precision goes."""
    try:
        merged = act()
    except HoraError:
        assert not any(module.merged for module in model.modules() if isinstance(module, HoraLayer))
        assert torch.equal(evaluate(model, inputs), expected)
        return False
    found = evaluate(merged, inputs)
    assert (found - expected).abs().max() < 0.1 * (plain - expected).abs().max()
    return True


def test_merging_changes_the_weight_or_is_refused(family, kind):
    model, _ = adapt(family, kind)
    inputs = family.inputs()
    plain, expected = evaluate(quantised(family, kind), inputs), evaluate(model, inputs)
    differ(plain, expected)

    def merge():
        model.merge_adapter()
        return model

    if assert_merged_or_refused(merge, model, inputs, expected, plain):
        model.unmerge_adapter()
    assert torch.equal(evaluate(model, inputs), expected)
    with model.disable_adapter():
        assert torch.equal(evaluate(model, inputs), plain)


@pytest.mark.parametrize("safe_merge", [False, True], ids=["quick", "safe"])
def test_unloading_keeps_the_update_or_is_refused(family, kind, safe_merge):
    model, _ = adapt(family, kind)
    inputs = family.inputs()
    plain, expected = evaluate(quantised(family, kind), inputs), evaluate(model, inputs)
    assert_merged_or_refused(lambda: model.merge_and_unload(safe_merge=safe_merge), model, inputs, expected, plain)


def test_the_message_of_a_refused_merge_names_the_type(family):
    model, _ = adapt(family, "own")
    with pytest.raises(HoraError, match="Codes"):
        model.merge_adapter()


def test_a_quantised_base_is_saved_and_loaded(family, kind, tmp_path):
    model, _ = adapt(family, kind)
    expected = evaluate(model, family.inputs())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantised(family, kind), tmp_path)
    assert torch.equal(evaluate(loaded, family.inputs()), expected)


def test_plain_weights_are_no_subclass(family):
    model = adapted(family)
    expected = evaluate(model, family.inputs())
    model.merge_adapter()
    torch.testing.assert_close(evaluate(model, family.inputs()), expected, rtol=1e-4, atol=1e-5)
