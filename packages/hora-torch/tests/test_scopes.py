"""What a scope makes ahead, hands on, compares and forgets, asked of it directly."""

import contextlib
import contextvars

import hora_torch
import pytest
import torch
from hora_spec import HoraError
from hora_torch import lifetime
from hora_torch.layer import HoraLayer
from torch import nn

from .oracle import adapted, agree, differ, evaluate, parameters
from .test_cached_factors import Generations, scale


@pytest.fixture
def family(families):
    return families["llama"]


@pytest.fixture
def model(family):
    return adapted(family)


@pytest.fixture
def hypernets(model):
    return [module.hora_hyper["default"] for module in model.modules() if getattr(module, "hora_hyper", None)]


@pytest.fixture
def projections(model):
    return [module for module in model.modules() if isinstance(module, HoraLayer)][:2]


def test_the_first_layer_of_a_call_generates_for_those_that_the_call_will_need(model, hypernets):
    first, second = hypernets
    with torch.no_grad(), lifetime.during_call(model, lambda: [second, first]):
        made = lifetime.kept(first)[first]
        with Generations() as seen:
            assert lifetime.kept(second)[second].keys() == {"q", "v"}
            assert lifetime.kept(first)[first] is made
        assert seen.count == 0
    with torch.no_grad(), lifetime.during_call(model, lambda: [first]):
        lifetime.kept(first)
        with Generations() as seen:
            lifetime.kept(second)
        assert seen.count > 0


def test_a_scope_that_is_over_holds_nothing_and_is_nowhere(model, family, hypernets, projections):
    q, v = projections
    with lifetime.during_call(model, lambda: hypernets) as scope:
        inherited = contextvars.copy_context()
        q(torch.ones(1, q.in_features))
        evaluate(model, family.inputs())
        assert scope.kept
        assert scope.handed
    assert lifetime._SCOPE.get() is None
    assert not scope.kept
    assert not scope.handed
    assert inherited.run(lifetime._SCOPE.get) is scope
    x = torch.randn(1, 3, q.in_features)
    inherited.run(q, x)
    before = v(x)
    scale(model)
    agree(inherited.run(v, x), v(x))
    differ(before, v(x))


def test_nothing_is_handed_on_outside_of_a_call(model, projections):
    """Two calls of a projection with gradients are no call of the model, though factors are kept around them."""
    q, v = projections
    x = torch.randn(1, 3, q.in_features)
    with hora_torch.cached_factors(model):
        q(x)
        before = v(x)
        q(x)
        scale(model)
        after = v(x)
    differ(before, after)
    agree(after, v(x))


@pytest.mark.parametrize("within", [torch.no_grad, lifetime.is_observed], ids=["no gradients", "a transform"])
def test_nothing_is_handed_on_under(model, hypernets, within, monkeypatch):
    if within is lifetime.is_observed:
        monkeypatch.setattr(lifetime, "is_observed", lambda: True)
    with lifetime.during_call(model, lambda: hypernets):
        with torch.no_grad() if within is torch.no_grad else contextlib.nullcontext():
            assert lifetime.handed(hypernets[0], ["q"]) is None
        monkeypatch.undo()
        assert lifetime.handed(hypernets[0], ["q"]).keys() == {"q"}


@pytest.mark.parametrize("when", ["gradients", "a transform"])
def test_nothing_is_kept_under(model, hypernets, when, monkeypatch):
    if when == "a transform":
        monkeypatch.setattr(lifetime, "is_observed", lambda: True)
    with hora_torch.cached_factors(model):
        with torch.set_grad_enabled(when == "gradients"):
            assert lifetime.kept(hypernets[0]) is None
        monkeypatch.undo()
        with torch.no_grad():
            assert lifetime.kept(hypernets[0]) is not None


def to_meta(hypernet):
    """As a hook that offloads does after each call: other objects, which stand for what is elsewhere."""
    for module in hypernet.modules():
        for name, param in list(module._parameters.items()):
            module._parameters[name] = nn.Parameter(param.to("meta"))


def test_what_was_kept_serves_while_the_parameters_are_elsewhere(model, family, hypernets):
    with hora_torch.cached_factors(model):
        expected = evaluate(model, family.inputs())
        for hypernet in hypernets:
            to_meta(hypernet)
        assert torch.equal(evaluate(model, family.inputs()), expected)


class Sharded(torch.Tensor):
    """A tensor of another type, as a part of a parameter may be."""


def to_another_type(param):
    return nn.Parameter((param.detach() * 0).as_subclass(Sharded))


def to_another_shape(param):
    return nn.Parameter(param.detach().flatten()[:1])


@pytest.mark.parametrize("change", [to_another_type, to_another_shape], ids=lambda change: change.__name__)
def test_what_was_sharded_or_moved_inside_a_scope_is_not_called_changed(model, family, hypernets, change):
    with hora_torch.cached_factors(model):
        evaluate(model, family.inputs())
        for hypernet in hypernets:
            hypernet.b_in = change(hypernet.b_in)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_a_change_of_one_bit_inside_a_scope_is_noticed(model, family, value):
    param = next(iter(parameters(model).values()))
    with torch.no_grad():
        param.fill_(value)

    def change():
        with hora_torch.cached_factors(model):
            evaluate(model, family.inputs())
            param.data[0, 0] = torch.nextafter(param.data[0, 0], torch.tensor(torch.inf))

    with pytest.raises(HoraError, match="inside cached_factors"):
        change()


def test_a_diverged_adapter_is_not_called_changed(model, family):
    with torch.no_grad():
        next(iter(parameters(model).values())).fill_(torch.nan)
    with hora_torch.cached_factors(model):
        evaluate(model, family.inputs())


def test_a_compiled_call_opens_no_scope(model, monkeypatch):
    assert isinstance(lifetime.during_call(model), lifetime._Scope)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert isinstance(lifetime.during_call(model), contextlib.nullcontext)
