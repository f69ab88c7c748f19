"""An adapted map beside sums that are told by hand: dropout, several adapters, odd and distributed bases."""

import hora_torch
import peft
import pytest
import torch
from hora_spec import HoraError
from hora_torch.adapted_linear import HoraLinear, is_plain
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import functional as F  # noqa: N812 - as everybody calls it
from transformers.pytorch_utils import Conv1D

from .test_verify import small

EMBED, ROWS = 8, 6


class Scaled(nn.Linear):
    """Does more than a linear map."""

    def forward(self, x, scale=2.0):
        return scale * super().forward(x)


class Several(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class Detached(nn.Linear):
    """As a kernel without a backward."""

    def forward(self, x):
        return super().forward(x).detach()


def adapted(base=None, *, rates=(0.0,), **kwargs):
    """An adapted map with one adapter for each rate of dropout, all of them active."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(EMBED, ROWS) if base is None else base)
    names = ["zeroth", "first"][: len(rates)]  # in another order than that of the alphabet
    for name, rate in zip(names, rates, strict=True):
        config = small(target_modules=["0"], hora_dropout=rate, **kwargs)
        if name == names[0]:
            model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.base_model.set_adapter(names)
    layer = model.base_model.model[0]
    assert isinstance(layer, HoraLinear)
    return layer


def given(*shape):
    return torch.randn(*(shape or (3, 5, EMBED)), generator=torch.Generator().manual_seed(1))


def delta(layer, name="zeroth"):
    return layer.get_delta_weight(name).detach()


def agree(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_each_input_feature_is_dropped_or_scaled_up():
    layer = adapted(rates=(0.25,)).train()
    x = torch.eye(EMBED).repeat(200, 1, 1)  # in each row one feature
    branch = layer(x).detach() - layer.base_layer(x).detach()
    whole = (delta(layer).T / 0.75).expand_as(branch)
    kept = (branch.abs().amax(-1) > 1e-6).unsqueeze(-1)
    agree(branch, torch.where(kept, whole, torch.zeros(())))
    assert 0.72 < float(kept.float().mean()) < 0.78
    agree(layer.eval()(x), layer.base_layer(x) + x @ delta(layer).T)


@pytest.mark.parametrize("base", [nn.Linear(EMBED, ROWS), Scaled(EMBED, ROWS)], ids=["plain", "odd"])
@pytest.mark.parametrize("rates", [(0.5, 0.0), (0.0, 0.5)])
def test_an_adapter_without_dropout_is_not_dropped_beside_one_with_it(base, rates):
    layer = adapted(base, rates=rates).train()
    x = torch.eye(EMBED).repeat(50, 1, 1)
    named = dict(zip(rates, ("zeroth", "first"), strict=True))
    rest = layer(x).detach() - layer.base_layer(x).detach() - x @ delta(layer, named[0.0]).T
    kept = (rest.abs().amax(-1) > 1e-5).unsqueeze(-1)
    agree(rest, torch.where(kept, 2 * delta(layer, named[0.5]).T.expand_as(rest), torch.zeros(())))
    assert 0.4 < float(kept.float().mean()) < 0.6


@pytest.mark.parametrize("base", [nn.Linear(EMBED, ROWS), Scaled(EMBED, ROWS)], ids=["plain", "odd"])
def test_all_adapters_that_are_active_are_added(base):
    layer, x = adapted(base, rates=(0.0, 0.0)), given()
    agree(layer(x), layer.base_layer(x) + x @ (delta(layer, "zeroth") + delta(layer, "first")).T)


def test_two_adapters_with_dropout_have_masks_of_their_own():
    layer = adapted(rates=(0.5, 0.5)).train()
    x = torch.eye(EMBED).repeat(100, 1, 1)
    branch = layer(x).detach() - layer.base_layer(x).detach()
    both = 2 * (delta(layer, "zeroth") + delta(layer, "first")).T
    alike = torch.isclose(branch, both.expand_as(branch), atol=1e-5).all(-1)
    none = (branch.abs() < 1e-5).all(-1)
    assert 0.15 < float(alike.float().mean()) < 0.35
    assert 0.15 < float(none.float().mean()) < 0.35


def test_a_plain_base_is_not_called_and_any_other_is(monkeypatch):
    hooked = nn.Linear(EMBED, ROWS)
    hooked.register_forward_hook(lambda module, args, y: 2 * y)
    for base in (Scaled(EMBED, ROWS), hooked):
        layer, x = adapted(base), given()
        agree(layer(x), 2 * F.linear(x, base.weight, base.bias) + x @ delta(layer).T)
        assert not is_plain(base)
    layer = adapted(Scaled(EMBED, ROWS))
    for args, kwargs in (((3.0,), {}), ((), {"scale": 3.0})):
        plain = F.linear(x, layer.base_layer.weight, layer.base_layer.bias)
        agree(layer(x, *args, **kwargs), 3 * plain + x @ delta(layer).T)
    layers = [adapted(), adapted(Conv1D(ROWS, EMBED))]
    expected = [
        layer.base_layer(x) + x @ (delta(layer) if i == 0 else delta(layer).T).T for i, layer in enumerate(layers)
    ]
    for kind in (nn.Linear, Conv1D):
        monkeypatch.setattr(kind, "forward", lambda *args, **kwargs: pytest.fail("it is called"))
    for layer, output in zip(layers, expected, strict=True):
        agree(layer(x), output)


def test_an_argument_that_the_base_does_not_know_is_its_error():
    with pytest.raises(TypeError, match="scale"):
        adapted()(given(), scale=3.0)
    with pytest.raises(TypeError):
        adapted()(given(), 3.0)


@pytest.mark.parametrize("route", ["branch", "merge"])
def test_the_route_of_the_config_is_taken(route, monkeypatch):
    taken = []
    real = hora_torch.adapted_linear.low_rank_linear
    spy = lambda *args, **kwargs: taken.append(kwargs["route"]) or real(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(hora_torch.adapted_linear, "low_rank_linear", spy)
    layer = adapted(route=route)
    agree(layer(given()), layer.base_layer(given()) + given() @ delta(layer).T)
    assert taken == [route]


def test_the_input_of_a_projection_is_its_argument():
    x = given()
    layer = adapted()
    assert layer.input_of("weight", (x, 1), {}) is x
    assert layer.input_of("weight", (), {"x": x}) is x


def test_without_an_adapter_that_works_the_base_answers():
    layer = adapted(Scaled(EMBED, ROWS))
    layer.enable_adapters(False)
    assert torch.equal(layer(given(), scale=3.0), layer.base_layer(given(), scale=3.0))
    assert torch.equal(layer(given(), adapter_names=["zeroth"] * 3), layer.base_layer(given()))
    assert repr(layer).startswith("hora.HoraLinear(")


def test_samples_may_have_adapters_of_their_own():
    layer, x = adapted(Scaled(EMBED, ROWS), rates=(0.0, 0.5)).train(), given()
    layer.eval()
    found = layer(x, adapter_names=["first", "__base__", "zeroth"], scale=3.0)
    updates = torch.stack([delta(layer, "first"), torch.zeros(ROWS, EMBED), delta(layer, "zeroth")])
    agree(found, layer.base_layer(x, scale=3.0) + x @ updates.mT)
    with pytest.raises(HoraError, match="got 2 and 3 respectively: give one name per sample"):
        layer(x, adapter_names=["first", "zeroth"])


def test_a_base_that_is_no_map_or_stops_gradients_is_refused():
    with pytest.raises(HoraError, match="returns one tensor, Several returned a tuple"):
        adapted(Several(EMBED, ROWS))(given())
    layer = adapted(Detached(EMBED, ROWS))
    with pytest.raises(HoraError, match="hands the gradient on to its input, Detached"):
        layer(given().requires_grad_())
    with torch.no_grad():
        layer(given().requires_grad_())
    layer(given())


class Local(nn.Linear):
    """As tensor parallelism leaves a map: a distributed weight, local tensors."""

    def forward(self, x):
        return F.linear(x, self.weight.to_local(), self.bias)


class Taking(Local):
    """Takes what is distributed."""

    def forward(self, x):
        return super().forward(x.to_local())


class Whole(Local):
    """Returns what is distributed."""

    def forward(self, x):
        return distribute_tensor(super().forward(x), self.weight.device_mesh, [Replicate()])


def distributed_map(kind, mesh, axis, **kwargs):
    layer = adapted(kind(EMBED, ROWS), **kwargs)
    expected = delta(layer)
    base = layer.base_layer
    base.weight = nn.Parameter(distribute_tensor(base.weight.detach(), mesh, [Shard(axis)]), requires_grad=False)
    return layer, expected


def test_a_distributed_base_takes_and_returns_local_tensors(one_process):
    layer, added = distributed_map(Local, one_process, 0)
    agree(layer(given()), layer.base_layer(given()) + given() @ added.T)
    (taking, _), (whole, _) = (distributed_map(kind, one_process, 0) for kind in (Taking, Whole))
    local = distribute_tensor(given(), one_process, [Replicate()])
    for odd, x in ((whole, given()), (taking, local)):
        with pytest.raises(HoraError, match="takes and returns local tensors when its weight is sharded"):
            odd(x)
    columns, _ = distributed_map(Local, one_process, 1)
    with pytest.raises(HoraError, match=r"sharded by its output rows \(axis 0\)"):
        columns(given())


def test_a_part_of_a_weight_that_is_whole_here_is_added_to_its_own_rows(one_process):
    kwargs = {"row_order": {"0": "q:1*3 v:1*3"}, "fused_projections": ("v",)}
    layer, added = distributed_map(Local, one_process, 0, **kwargs)
    assert not added[:3].any()
    assert added[3:].all()
    agree(layer(given()), layer.base_layer(given()) + given() @ added.T)
