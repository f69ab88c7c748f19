"""Quantised models for tests, what their codes are and what they multiply with."""

import copy
import sys
from pathlib import Path

import peft
import pytest
import torch
from hora_torch.layer import HoraLayer
from peft.utils.quantization_utils import QuantizationBackend
from peft.utils.quantization_utils import resolve_quantization_backend as resolve
from torch import nn

from . import oracle
from .oracle import config, parameters

sys.path.insert(0, str(Path(__file__).parents[1] / "quantised"))
import bases
from bases import Base, floats, inputs, save_float_model

__all__ = ["BASES", "LIBRARIES", "MERGING", "SOME", "floats", "inputs", "save_float_model"]


class RowCodes(nn.Module):
    """Eight bits and one scale for each row: what needs no library and has every right that codes can have."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.quantize(linear.weight.detach())

    def quantize(self, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.W_q = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.meta = {"scale": scale}

    def dequantize(self):
        return self.W_q.float() * self.meta["scale"]

    def forward(self, x):
        return nn.functional.linear(x, self.dequantize(), self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}scale"] = self.meta["scale"]


class RowBackend(QuantizationBackend):
    """Of the form that HQQ has."""

    supports_merge, backend_name = True, "hqq"

    def get_base_weight(self, base_layer):
        return base_layer.dequantize()

    def set_base_weight(self, peft_layer, weight_data):
        peft_layer.get_base_layer().quantize(weight_data)


@pytest.fixture(autouse=True)
def row_backend(monkeypatch):
    """PEFT knows `RowBackend`; to be imported where models are quantised."""
    monkeypatch.setattr(
        "hora_torch.quantized.resolve_quantization_backend",
        lambda base, **options: RowBackend() if isinstance(base, RowCodes) else resolve(base, **options),
    )


def rows(folder):
    model = floats(folder)
    for parent, name, linear in bases.projections(model):
        setattr(parent, name, RowCodes(linear))
    return model.eval()


OWN = "rows of eight bits"
BASES = bases.BASES | {OWN: Base(rows)}
MERGING = [name for name, base in BASES.items() if base.merges]
LIBRARIES = [name for name in MERGING if name != OWN]
SOME = ["bitsandbytes int8", "bitsandbytes nf4, double", "torchao int4", "torchao int8, by hand", "HQQ 4 bits"]
SOME += ["quanto int8", OWN]
LOADED: dict[tuple[str, bool], nn.Module] = {}
MARKS = [
    pytest.mark.filterwarnings("ignore:.*torchao.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:a merge into quantised weights:UserWarning"),
]


def quantised(name, folder, *, packs=False):
    if name == OWN:
        return rows(folder)
    needs(name)
    if not BASES[name].copies:
        return bases.load(name, folder)
    if (name, packs) not in LOADED:
        LOADED[name, packs] = bases.load(name, folder, packs=packs)
    return copy.deepcopy(LOADED[name, packs])


def needs(name):
    """Skip unless the library of a base is there."""
    if library := bases.missing(name):
        pytest.skip(f"{library} is optional: one of the libraries whose weights are adapted")


def adapt(name, folder, **kwargs):
    """A quantised model with an adapter whose update is about a tenth of the weights."""
    torch.manual_seed(0)
    return peft.get_peft_model(quantised(name, folder, packs=True), config(hora_alpha=0.2, **kwargs)).eval()


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, HoraLayer)}


def multiplies_with(linear):
    """The weight of a linear map in floats, found by multiplying."""
    linear.train()
    with torch.no_grad():
        product = linear(torch.eye(linear.in_features))
        product = product - linear.bias if linear.bias is not None else product
    linear.eval()
    return product.T.float().contiguous()


def flat(tensor):
    """The plain tensors of a tensor."""
    if type(tensor) is not torch.Tensor and hasattr(tensor, "__tensor_flatten__"):
        return [part for name in tensor.__tensor_flatten__()[0] for part in flat(getattr(tensor, name))]
    return [tensor.detach().clone()]


def codes(model):
    """Every stored tensor of every adapted base, as its library saves it."""
    return {
        f"{name}.{key}": flat(value)
        for name, layer in layers(model).items()
        for key, value in layer.get_base_layer().state_dict().items()
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensors in found.items():
        for one, other in zip(tensors, expected[name], strict=True):
            assert one.dtype == other.dtype, name
            assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name


def changed(found, expected):
    return any(
        not torch.equal(one, other) for name in found for one, other in zip(found[name], expected[name], strict=True)
    )


def in_floats(name, folder, model, **kwargs):
    """The same adapter on a plain model of the values that the quantised base multiplies with."""
    plain, base = floats(folder), quantised(name, folder)
    for path, module in plain.named_modules():
        if path.endswith("proj"):
            module.weight.data = multiplies_with(base.get_submodule(path))
    plain = peft.get_peft_model(plain, config(hora_alpha=0.2, **kwargs)).eval()
    for one, other in zip(parameters(plain).values(), parameters(model).values(), strict=True):
        one.data = other.detach().clone()
    return plain


def gradients(model):
    model.zero_grad()
    oracle.output(model.train()(**inputs())).square().sum().backward()
    return {name: param.grad.clone() for name, param in parameters(model).items()}


def close(found, expected, share):
    assert (found - expected).norm() <= share * expected.norm()
