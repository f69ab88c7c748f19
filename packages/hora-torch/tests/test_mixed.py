"""Batches whose samples have adapters of their own."""

import itertools
from collections import Counter

import peft
import pytest
import torch
from hora_torch import HoraConfig
from hora_torch.hypernet import HoraHypernet
from hora_torch.mixed import add_by_sample
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

NAMES = [
    *itertools.permutations(["a", "b", "other"]),
    ("a", "a", "b"),
    ("b", "a", "b"),
    ("other", "a", "other"),
    ("other", "other", "other"),
]


@pytest.mark.parametrize("names", NAMES)
def test_each_sample_gets_what_its_own_adapter_adds(names):
    y, x, asked = torch.randn(3, 2, 4), torch.randn(3, 2, 5), Counter()

    def add(name, own, inputs):
        asked[name] += 1
        return own + {"a": 2, "b": 3}[name] * inputs[..., :4]

    result = add_by_sample(y, x, names, {"a", "b"}, add)
    expected = torch.stack([y[i] + {"a": 2, "b": 3, "other": 0}[name] * x[i, :, :4] for i, name in enumerate(names)])
    assert torch.equal(result, expected)
    assert asked == Counter(set(names) & {"a", "b"})


def test_samples_are_sorted_on_the_device_of_the_inputs():
    with FakeTensorMode():  # says when an operation reads two devices, and needs no second one
        y, x = torch.empty(3, 4, device="cuda"), torch.empty(3, 4, device="cuda")
        result = add_by_sample(y, x, ["b", "a", "b"], {"a", "b"}, lambda name, own, inputs: own + inputs)
    assert result.device.type == "cuda"


class Attention(nn.Module):
    """One query map where the heads are known."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.q_proj = 2, nn.Linear(8, 8)

    def forward(self, x):
        return self.q_proj(x)


@pytest.mark.parametrize("layers", [1, 4])
def test_a_mixed_call_looks_once_at_each_adapter_that_it_names(layers, monkeypatch):
    model, calls, looks = nn.Sequential(*(Attention() for _ in range(layers))), Counter(), Counter()
    model = peft.get_peft_model(model, HoraConfig(r=2, target_modules=["q_proj"], init_weights=False))
    for name in ("one", "two", "three"):
        model.add_adapter(name, HoraConfig(r=2, target_modules=["q_proj"], init_weights=False))
    generate, registered = HoraHypernet.forward, HoraHypernet.registered
    monkeypatch.setattr(HoraHypernet, "forward", lambda self, *a, **k: calls.update([self]) or generate(self, *a, **k))
    monkeypatch.setattr(HoraHypernet, "registered", lambda self: looks.update([self]) or registered(self))
    with torch.no_grad():
        model.eval()(torch.randn(4, 8), adapter_names=["one", "two", "one", "__base__"])
    assert len(calls) == 2 * layers
    assert set(calls.values()) == {1}
    assert max(looks.values()) <= 2, "of each layer all others are walked"
