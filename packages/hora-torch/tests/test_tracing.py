"""What takes part in an output, and what moves it, told on maps written out by hand."""

import pytest
import torch
from hora_spec import Layout, ProjectionShape, Site, Window
from hora_torch.tracing import floating, traced
from torch import nn

BATCH, LENGTH, EMBED, ROWS = 2, 3, 4, 6


def rows(start, stop, parameter="weight"):
    """A projection of some rows of a map."""
    window = Window(0, start, stop)
    shape = ProjectionShape(1, stop - start, EMBED)
    return Site("m", parameter, (ROWS, EMBED), Layout("(h k) d", window), shape)


def given(*shape):
    return torch.rand(*(shape or (BATCH, LENGTH, EMBED)), generator=torch.Generator().manual_seed(0)) + 0.5


def maps(*names):
    """Frozen maps, so that nothing but what is beside an output has a gradient."""
    return {name: nn.Linear(EMBED, ROWS).requires_grad_(False) for name in names}


def test_of_a_layer_the_rows_that_the_output_depends_on_take_part():
    layers = maps("a", "idle", "uncalled")

    def run():
        layers["idle"](given())
        return layers["a"](given())[..., 2:4]

    with torch.no_grad():
        trace = traced(run, layers, [])
    assert [trace.called(name) for name in layers] == [True, True, False]
    assert [trace.takes_part(name) for name in layers] == [True, False, False]
    assert [trace.takes_part("a", rows(at, at + 2)) for at in (0, 2, 4)] == [False, True, False]
    assert trace.takes_part("a", rows(0, 6, "in_proj_weight"))  # whose module's output is that of all
    assert trace.takes_part("a", rows(0, 2, "in_proj_weight"))


def test_each_call_of_a_layer_counts():
    layers = maps("a", "b")

    def run():
        first, _, third = (layers["a"](given()) for _ in range(3))
        return torch.cat([first[..., :1], third[..., 5:], layers["b"](given())[:1, :1, 3:4].expand(BATCH, LENGTH, 1)])

    trace = traced(run, layers, [])
    assert [trace.takes_part("a", rows(at, at + 1)) for at in range(ROWS)] == [True, False, False, False, False, True]
    assert [trace.takes_part("b", rows(at, at + 1)) for at in range(ROWS)] == [False, False, False, True, False, False]


def test_the_rows_of_one_position_are_enough():
    layers = maps("a")
    for position in ((0, 0), (1, 2)):
        trace = traced(lambda position=position: layers["a"](given())[position][1:2], layers, [])
        assert [trace.takes_part("a", rows(at, at + 1)) for at in range(3)] == [False, True, False]


CONVOLUTIONS = {nn.Conv1d: (5,), nn.Conv2d: (5, 7), nn.Conv3d: (5, 7, 8)}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_rows_of_a_convolution_are_its_channels(kind):
    layers = {"a": kind(EMBED, ROWS, 1)}
    trace = traced(lambda: layers["a"](given(BATCH, EMBED, *CONVOLUTIONS[kind]))[:, 1:2], layers, [])
    assert [trace.takes_part("a", rows(at, at + 1)) for at in range(ROWS)] == [False, True, False, False, False, False]


class Takes(nn.Linear):
    """Takes its input by name, and returns more than a tensor."""

    def forward(self, x, *, others):
        return super().forward(x), others


def test_a_layer_without_an_input_takes_no_part():
    """As an adapter between zeros, whose gradient is zero whatever it is."""
    layers = {"a": Takes(EMBED, ROWS)}
    for empty, takes_part in ((True, False), (False, True)):
        inputs = {"x": 0 * given() if empty else given(), "others": [{"mask": torch.ones(3, dtype=torch.long)}]}
        trace = traced(lambda inputs=inputs: layers["a"](**inputs)[0], layers, [])
        assert trace.called("a")
        assert trace.takes_part("a") == takes_part
    inputs = 0 * given(), {"others": (given(),)}  # an input is found in what is nested
    assert traced(lambda: layers["a"](inputs[0], **inputs[1])[0], layers, []).takes_part("a")


def test_what_a_layer_returns_beside_its_output_is_handed_on():
    layers = {"a": Takes(EMBED, ROWS)}
    returned = []

    def run():
        returned.extend(layers["a"](given(), others=[3, 4]))
        return returned[0]

    assert traced(run, layers, []).takes_part("a")
    assert torch.equal(returned[0], layers["a"](given(), others=())[0])
    assert returned[1:] == [[3, 4]]
    assert not layers["a"]._forward_hooks


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_not_followed():
    layers = maps("a")
    nested = torch.nested.nested_tensor([given(2, EMBED), given(3, EMBED)])
    trace = traced(lambda: layers["a"](nested).to_padded_tensor(0.0), layers, [])
    assert trace.called("a")
    assert not trace.takes_part("a")


def test_a_parameter_moves_an_output_by_a_gradient_that_is_not_zero():
    moving, still, idle, frozen = (nn.Parameter(given(EMBED), requires_grad=i < 3) for i in range(4))
    params = [idle, moving, still, frozen]
    trace = traced(lambda: given() * moving * frozen + 0 * still, {}, params)
    assert [trace.moves(param) for param in params] == [False, True, False, False]
    assert not any(param.grad is not None for param in params)
    layers = maps("a")
    trace = traced(lambda: layers["a"](given() * moving * frozen), layers, params)
    assert [trace.moves(param) for param in params] == [False, True, False, False]
    assert trace.takes_part("a")


def test_a_constant_depends_on_nothing():
    layers, param = maps("a"), nn.Parameter(given(EMBED))
    trace = traced(lambda: layers["a"](given()).detach(), layers, [param])
    assert trace.called("a")
    assert not trace.takes_part("a")
    assert not trace.moves(param)


def test_no_sum_of_rows_hides_one_of_them():
    """As a softmax, whose sum is constant: the output is looked at from one random side, always the same."""
    layers = maps("a")
    state = torch.get_rng_state()
    trace = traced(lambda: layers["a"](given()).softmax(-1), layers, [])
    assert all(trace.takes_part("a", rows(at, at + 1)) for at in range(ROWS))
    assert torch.equal(torch.get_rng_state(), state)


def test_floating_tensors_are_found_in_what_is_nested():
    first, second, third = torch.ones(1), torch.ones(2, dtype=torch.bfloat16), torch.ones(3)
    nested = {"a": [first, torch.ones(1, dtype=torch.long), None, "text"], "b": (second, {"c": third}), "d": 1.0}
    assert [id(tensor) for tensor in floating(nested)] == [id(first), id(second), id(third)]
    assert [*floating(first)] == [first]
