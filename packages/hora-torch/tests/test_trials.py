"""What a joint start measures on a model, against gradients and moments that are formed whole."""

import hora_torch
import numpy as np
import peft
import pytest
import torch
from hora_spec import HoraError
from hora_spec.joint import LOSS_SCALE
from hora_torch.layer import HoraLayer
from hora_torch.trials import Trial, _over_processes, unchanged
from torch import nn

HEADS, WIDTH, EMBED, PROBES = 2, 3, 5, 4
ROWS = HEADS * WIDTH


class Attention(nn.Module):
    """A query and a value; the third map is called by nobody."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.k_proj = (nn.Linear(EMBED, ROWS) for _ in range(3))
        self.drop = nn.Dropout(0.5)

    def forward(self, hidden_states=None, attention_mask=None):
        return self.drop(self.q_proj(hidden_states)) * self.v_proj(hidden_states)


def mean(model, batch):
    return model(**batch).square().mean()


def batches(count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [{"hidden_states": torch.randn(2, 4, EMBED, generator=generator).to(dtype)} for _ in range(count)]


def trial(loss=mean, data=None, targets=("q_proj", "v_proj"), alpha=3.0, model=None):
    """The passes over an adapter whose scaling is not one, and its name for its layer."""
    torch.manual_seed(0)
    model = model or Attention()
    config = hora_torch.HoraConfig(
        r=2, hora_alpha=alpha, sharing="a", a_source="fixed", target_modules=[*targets], num_heads=HEADS
    )
    model = peft.get_peft_model(model, config)
    layers = [module for module in model.modules() if isinstance(module, HoraLayer)]
    hypernets = {layer: layer.hora_hyper["default"] for layer in layers if "default" in layer.hora_hyper}
    made = Trial(model, "default", layers, hypernets, batches() if data is None else data, loss)
    return made, next(iter(hypernets.values())).name


def probes(name, *shape, of=("q", "v")):
    generator = np.random.default_rng(0)
    return {name: {p: generator.normal(size=shape).astype(np.float32) for p in of}}


def whole(made, loss=mean):
    """The gradients of the weights themselves, of the mean loss."""
    base = made.model.base_model.model.eval()
    weights = {p: getattr(base, f"{p}_proj").base_layer.weight.requires_grad_() for p in "qv"}
    value = sum(loss(made.model, batch) for batch in batches()) / len(batches())
    grads = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
    return {p: None if grad is None else grad.numpy() for p, grad in zip(weights, grads, strict=True)}


def test_left_and_right_are_products_with_the_gradient_of_the_weight():
    made, name = trial()
    with unchanged(made.model):
        left = made.left(probes(name, ROWS, PROBES))
        right = made.right(probes(name, PROBES, EMBED))
    for p, grad in whole(made).items():
        assert left[name][p].shape == (PROBES, EMBED)
        assert right[name][p].shape == (ROWS, PROBES)
        np.testing.assert_allclose(left[name][p], probes(name, ROWS, PROBES)[name][p].T @ grad, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(right[name][p], grad @ probes(name, PROBES, EMBED)[name][p].T, rtol=1e-4, atol=1e-6)
    assert made.scale == LOSS_SCALE


def test_a_projection_that_the_loss_does_not_ask_for_has_no_gradient():
    def of_q(model, batch):
        return model.base_model.model.q_proj(batch["hidden_states"]).square().mean()

    made, name = trial(of_q)
    with unchanged(made.model):
        left = made.left(probes(name, ROWS, PROBES))[name]
    assert not left["v"].any()
    grad = whole(made, of_q)["q"]
    np.testing.assert_allclose(left["q"], probes(name, ROWS, PROBES)[name]["q"].T @ grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1e35, 1e36])
def test_a_loss_that_is_too_large_to_be_multiplied_is_multiplied_by_less(size):
    made, name = trial(lambda model, batch: size * mean(model, batch))
    with unchanged(made.model):
        found = made.left(probes(name, ROWS, PROBES))[name]
    steps = np.log2(LOSS_SCALE / made.scale) / 4
    assert steps == int(steps) > 0
    for p, grad in whole(made).items():
        expected = probes(name, ROWS, PROBES)[name][p].T @ grad
        np.testing.assert_allclose(found[p] / size, expected, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_never_finite_comes_back_as_it_is():
    made, name = trial(lambda model, batch: mean(model, batch) / 0 * 1)
    with unchanged(made.model):
        found = made.left(probes(name, ROWS, PROBES))[name]
    assert made.scale == 1
    assert not np.isfinite(found["q"]).any()


def padded(mask):
    return [batch | {"attention_mask": mask} for batch in batches()]


MASKS = {
    "none": (None, slice(None)),
    "of tokens": (torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]), [0, 1, 2, 4, 5]),
    "of another shape": (torch.tensor([1, 0]), slice(None)),
    "that is no tensor": ([[1, 1, 1, 0], [1, 1, 0, 0]], slice(None)),
}


@pytest.mark.parametrize("case", MASKS)
def test_moments_are_of_the_inputs_that_no_mask_leaves_out(case):
    mask, seen = MASKS[case]
    made, name = trial(data=padded(mask))
    basis = probes(name, PROBES, EMBED)
    found = made.inputs(basis)[name]
    x = np.concatenate([batch["hidden_states"].flatten(0, 1).numpy()[seen] for batch in batches()])
    for p in "qv":
        np.testing.assert_allclose(found[p].probed, basis[name][p] @ (x.T @ x) / len(x), rtol=1e-4, atol=1e-5)
        assert found[p].square == pytest.approx(float((x**2).sum() / len(x)), rel=1e-5)
    assert not any(module._forward_pre_hooks for module in made.model.modules() if isinstance(module, HoraLayer))


def test_the_inputs_of_batches_that_are_no_mappings_are_taken_whole():
    made, name = trial(lambda model, x: model(x).mean(), [batch["hidden_states"] for batch in batches()])
    assert made.inputs(probes(name, PROBES, EMBED))[name]["q"].square > 0


def test_a_layer_that_the_loss_does_not_call_is_named():
    made, name = trial(targets=("q_proj", "k_proj"))
    with pytest.raises(HoraError, match=rf"calls every adapted layer, got none of 'k' of {name!r}"):
        made.inputs(probes(name, PROBES, EMBED, of=("q", "k")))


def drawing(model, batch):
    return mean(model, {"hidden_states": batch["hidden_states"] + torch.rand(1)})


def emptied(model, batch):
    return mean(model, {"hidden_states": batch.pop("hidden_states") if isinstance(batch, dict) else batch.pop()})


def test_all_passes_see_one_function_whatever_is_drawn_or_taken_out():
    for loss, data in (
        (drawing, None),
        (emptied, None),
        (emptied, [[batch["hidden_states"]] for batch in batches()]),
        (
            lambda model, batch: mean(model, {"hidden_states": next(iter(batch))}),
            [(batch["hidden_states"],) for batch in batches()],
        ),
    ):
        made, name = trial(loss, data)
        with unchanged(made.model):
            once, again = (made.left(probes(name, ROWS, PROBES))[name]["q"] for _ in range(2))
        np.testing.assert_array_equal(once, again)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.0625), (torch.float64, 1e-4), (torch.float16, 2**-7)]
)
def test_a_loss_that_takes_another_value_is_refused(dtype, bound):
    for off, refused in ((0.97 * bound, False), (1.03 * bound, True)):
        values = iter([4.0, 4.0 * (1.0 + off)])
        made, _ = trial(lambda model, batch, values=values: torch.tensor(next(values)), model=Attention().to(dtype))
        made._value(0)
        if refused:
            with pytest.raises(HoraError, match="all passes see one function, got a loss of 4 and then"):
                made._value(0)
        else:
            made._value(0)


def test_a_loss_of_nothing_may_be_computed_again():
    made, _ = trial(lambda model, batch: torch.tensor(0.0))
    assert [float(made._value(0)) for _ in range(2)] == [0, 0]


LOSSES = {
    "shape": lambda model, batch: model(**batch),
    "no gradient": lambda model, batch: mean(model, batch).detach(),
    "got no gradient": lambda model, batch: mean(model, batch).item(),
}


@pytest.mark.parametrize("what", LOSSES)
def test_a_loss_that_cannot_be_differentiated_is_refused(what):
    made, name = trial(LOSSES[what])
    with pytest.raises(HoraError, match=f"one number that can be differentiated.*{what}"):
        made.left(probes(name, ROWS, PROBES))


def test_a_model_is_measured_in_evaluation_and_is_afterwards_what_it_was():
    made, name = trial()
    model = made.model.train()
    model.base_model.model.drop.eval()
    modes = [module.training for module in model.modules()]
    state, hypernets = torch.get_rng_state(), [layer.hora_hyper for layer in made.layers]
    before = [[*one.values()] for one in hypernets]

    def fails(model, batch):
        assert not any(module.training for module in model.modules() if isinstance(module, nn.Linear))
        raise LookupError

    made.loss = fails
    with pytest.raises(LookupError), unchanged(model):
        made.left(probes(name, ROWS, PROBES))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert [[*one.values()] for one in hypernets] == before
    assert not any(param.grad is not None for param in model.parameters())


def test_several_processes_add_up(monkeypatch):
    summed = []
    one = torch.ones(2)
    assert _over_processes(one) is one
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: summed.append(tensor.mul_(2)))
    assert _over_processes(one) is one
    assert one.tolist() == [2, 2]
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert _over_processes(one).tolist() == [2, 2]
