"""A joint start of one small layer: what is asked for is what is done, and what cannot be is refused."""

from types import SimpleNamespace

import hora_torch
import numpy as np
import peft
import pytest
import torch
from hora_spec import HoraError
from hora_torch import joint_a
from hora_torch.layer import HoraLayer
from torch import nn

EMBED, ROWS = 24, 24


class Attention(nn.Module):
    """A query and a value that read one input."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(EMBED, ROWS), nn.Linear(EMBED, ROWS)

    def forward(self, x=None, labels=None):
        y = self.q_proj(x).tanh() * self.v_proj(x)
        return SimpleNamespace(loss=None if labels is None else (y - labels).square().mean(), y=y)


def adapted(*, names=("default",), **kwargs):
    torch.manual_seed(0)
    method = {"r": 2, "sharing": "a", "a_source": "fixed", "target_modules": ["q_proj", "v_proj"], "num_heads": 2}
    model = peft.get_peft_model(Attention(), hora_torch.HoraConfig(**method | kwargs), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, hora_torch.HoraConfig(**method | kwargs))
    return model


def batches(count=2):
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(16, EMBED, generator=generator), "labels": torch.randn(16, ROWS, generator=generator)}
        for _ in range(count)
    ]


def loss(model, batch):
    return model(**batch).loss


def params(start):
    return {(layer, key): value for layer, own in start.params.items() for key, value in own.items()}


def same(one, other):
    return all(np.array_equal(value, params(other)[key]) for key, value in params(one).items())


def started(**kwargs):
    return joint_a(adapted(), batches(), loss, **kwargs)


def test_the_values_that_are_said_are_those_that_are_written():
    model = adapted()
    before = {name: param.clone() for name, param in model.named_parameters()}
    start = joint_a(model, batches(), loss)
    (hypernet,) = [
        layer.hora_hyper["default"] for layer in model.modules() if isinstance(layer, HoraLayer) and layer.hora_hyper
    ]
    assert {key for _, key in params(start)} == {"a.q", "a.v"}
    for (_, key), value in params(start).items():
        np.testing.assert_array_equal(hypernet.params()[key].numpy(), value)
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_each_setting_is_handed_on_and_its_default_is_that_of_the_specification():
    usual = started()
    settings = {"of": "gradient", "scale": "kaiming", "together": False, "power": 1, "oversample": 8}
    others = {"of": "inputs", "scale": "rows", "together": True, "power": 2, "oversample": 9}
    for name, value in settings.items():
        assert same(started(**{name: value}), usual), name
        assert not same(started(**{name: others[name]}), usual), name


def test_first_probes_are_those_of_the_config_s_seed():
    assert same(joint_a(adapted(seed=0), batches(), loss), started())
    assert not same(joint_a(adapted(seed=1), batches(), loss), started())


@pytest.mark.parametrize(
    ("kwargs", "passes"), [({}, 5), ({"power": 2}, 7), ({"of": "inputs"}, 4), ({"scale": "rows"}, 4)]
)
def test_so_many_passes_are_made(kwargs, passes):
    calls = []
    joint_a(adapted(), batches(), lambda model, batch: calls.append(1) or loss(model, batch), **kwargs)
    assert len(calls) == passes * len(batches())


def test_without_a_loss_that_of_the_model_is_taken():
    assert same(joint_a(adapted(), batches()), started())
    for data in ([{"x": batch["x"]} for batch in batches()], [batch["x"] for batch in batches()]):
        with pytest.raises(HoraError, match=f"got a batch of type {type(data[0]).__name__} and no such loss"):
            joint_a(adapted(), data)


def test_what_is_not_at_its_start_is_not_started():
    with pytest.raises(HoraError, match="A starts before training"):
        joint_a(adapted(init_weights=False), batches(), loss)
    away = adapted()
    for layer in away.modules():
        if isinstance(layer, HoraLayer) and layer.hora_hyper:
            layer.hora_hyper.to("meta")
    with pytest.raises(HoraError, match=r"are not here: start it before the model is offloaded \(spec I7\)"):
        joint_a(away, batches(), loss)


def inactive(model):
    model.set_adapter("two")


def disabled(model):
    model.base_model.disable_adapter_layers()


def merged(model):
    model.merge_adapter(["one"])


@pytest.mark.parametrize("change", [inactive, disabled, merged])
def test_an_adapter_that_does_not_work_is_not_started(change):
    model = adapted(names=("one", "two"))
    change(model)
    with pytest.raises(HoraError, match=r"'one' is not active, disabled or merged"):
        joint_a(model, batches(), loss, adapter_name="one")


def test_an_adapter_at_another_scale_is_not_started():
    model = adapted(names=("one", "two"))
    next(layer for layer in model.modules() if isinstance(layer, HoraLayer)).set_scale("one", 2.0)
    with pytest.raises(HoraError, match="'one' acts at 2 times its scale"):
        joint_a(model, batches(), loss, adapter_name="one")


def test_the_named_adapter_is_started_alone():
    model = adapted(names=("one", "two"))
    kept = {name: value.clone() for name, value in model.state_dict().items() if ".two." in name}
    start = joint_a(model, batches(), loss, adapter_name="one")
    assert params(start)
    assert kept
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items() if name in kept)
