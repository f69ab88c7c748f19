"""The adapted linear map: derivatives, autocast, checkpointing, compilation, dropout, fused windows, cost."""

import pytest
import torch
from hora_spec import Factors, HoraError
from hora_torch.functional import hora_linear
from hora_torch.linear import Branch, add_branches, has_hooks, low_rank_linear
from torch import nn
from torch.utils.checkpoint import checkpoint

HEADS, HEAD_DIM, EMBED, RANK = 3, 2, 5, 2
ROUTES = ["auto", "branch", "merge"]  # auto: single operations, for so few tokens


def given(*, dtype=torch.float64, embed=EMBED, tokens=4, grad=True):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    x, a, b = draw(2, tokens, embed), draw(RANK, embed), draw(HEADS, HEAD_DIM, RANK)
    if grad:
        x, a, b = (leaf.requires_grad_() for leaf in (x, a, b))
    return x, draw(HEADS * HEAD_DIM, embed), draw(HEADS * HEAD_DIM), a, b


def plain(x, weight, bias, a, b, scaling=0.5):
    return x @ (weight + scaling * b.flatten(0, 1) @ a).T + bias


@pytest.fixture(params=ROUTES)
def route(request):
    return request.param


def test_first_and_second_derivatives_match_finite_differences(route):
    x, weight, bias, a, b = given()
    f = lambda x, a, b: hora_linear(x, weight, bias, Factors(a, b), 0.5, route=route)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, a, b))
    assert torch.autograd.gradgradcheck(f, (x, a, b))


def test_a_weight_and_bias_that_train_get_their_gradients(route):
    x, weight, bias, a, b = given()
    weight.requires_grad_()
    bias.requires_grad_()
    leaves = (x, weight, bias, a, b)
    got = torch.autograd.grad(hora_linear(x, weight, bias, Factors(a, b), 0.5, route=route).sin().sum(), leaves)
    expected = torch.autograd.grad(plain(*leaves).sin().sum(), leaves)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), ()])
def test_no_tokens_and_a_single_one_keep_their_shape(route, shape):
    _, weight, bias, a, b = given()
    x = torch.ones(*shape, EMBED, dtype=torch.float64, requires_grad=True)
    y = hora_linear(x, weight, bias, Factors(a, b), 0.5, route=route)
    torch.testing.assert_close(y, plain(x, weight, bias, a, b))
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("trained", ["a", "b"])
def test_frozen_inputs_and_factors_get_none(route, trained):
    x, weight, bias, a, b = given(grad=False)
    learns, frozen = (a, b) if trained == "a" else (b, a)
    learns.requires_grad_()
    hora_linear(x, weight, bias, Factors(a, b), 0.5, route=route).sum().backward()
    assert x.grad is frozen.grad is None
    assert learns.grad is not None


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch 2.13: no rule for addmm_
def test_function_transforms(route):
    x, weight, bias, a, b = given(grad=False)
    loss = lambda x, a: hora_linear(x, weight, bias, Factors(a, b), 0.5, route=route).sin().sum()  # noqa: E731
    reference = lambda x, a: plain(x, weight, bias, a, b).sin().sum()  # noqa: E731
    torch.testing.assert_close(
        torch.func.grad(loss, argnums=(0, 1))(x, a), torch.func.grad(reference, argnums=(0, 1))(x, a)
    )
    per_sample = torch.func.vmap(torch.func.grad(reference, argnums=1), in_dims=(0, None))(x, a)
    got = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None))(x, a)
    torch.testing.assert_close(got, per_sample)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(route, use_reentrant):
    x, weight, bias, a, b = given()
    f = lambda x: hora_linear(x, weight, bias, Factors(a, b), 0.5, route=route).sin()  # noqa: E731
    expected = torch.autograd.grad(f(x).sum(), (x, a, b))
    checkpoint(f, x, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close((x.grad, a.grad, b.grad), expected, rtol=0, atol=0)


def test_a_whole_graph_compiles_with_its_gradients(route):
    x, weight, bias, a, b = given(dtype=torch.float32)
    f = lambda x, a, b: hora_linear(x, weight, bias, Factors(a, b), 0.5, route=route).sin().sum()  # noqa: E731
    expected = torch.autograd.grad(f(x, a, b), (x, a, b))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, a, b), (x, a, b)), expected)


def test_autocast_computes_in_its_dtype_and_keeps_float32_gradients():
    x, weight, bias, a, b = given(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = hora_linear(x, weight, bias, Factors(a, b), 0.5)
    assert y.dtype == torch.bfloat16
    y.float().sin().sum().backward()
    assert {leaf.grad.dtype for leaf in (x, a, b)} == {torch.float32}
    torch.testing.assert_close(y.float(), plain(x, weight, bias, a, b), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_delta_below_the_rounding_of_a_sixteen_bit_weight_is_not_lost(route, dtype, autocast, grad):
    """``x W^T`` is zero, so the delta is all that is left; ``W + delta`` would be ``W`` again."""
    delta, given = 2.0**-12, torch.float32 if autocast else dtype
    x, weight = torch.ones(1, 2, dtype=given), torch.tensor([[1.0, -1.0]], dtype=given)
    assert torch.equal((weight + delta).to(dtype), weight.to(dtype))
    factors = Factors(torch.tensor([[delta, 0.0]]).requires_grad_(grad), torch.ones(1, 1, 1))
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = hora_linear(x, weight, None, factors, 1.0, route=route)
    assert (y.dtype, y.item()) == (dtype, delta)


def test_a_bfloat16_base_saves_its_input_once_and_no_copy_of_it():
    x, weight, bias, a, b = given(dtype=torch.bfloat16, embed=64, tokens=32)
    saved = []
    pack = lambda tensor: saved.append(tensor) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        low_rank_linear(x, weight, bias, [Branch(a.float(), b.flatten(0, 1).float(), 0.5, 0, HEADS * HEAD_DIM)])
    wide = [tensor for tensor in saved if tensor.numel() >= x.numel()]
    assert [tensor.data_ptr() for tensor in wide] == [x.data_ptr()]
    assert wide[0].dtype == torch.bfloat16


def test_windows_of_a_fused_weight_are_added_to_their_columns_alone(route):
    x, _, _, a, b = given()
    weight = torch.randn(20, EMBED, dtype=torch.float64)
    b = b.flatten(0, 1)
    branches = [Branch(a, b, 0.5, 2, 8), Branch(2 * a, b.flip(0), 1.5, 12, 18)]
    delta = torch.zeros_like(weight)
    delta[2:8] = 0.5 * b @ a
    delta[12:18] = 3.0 * b.flip(0) @ a
    y = low_rank_linear(x, weight, None, branches, route=route)
    torch.testing.assert_close(y, x @ (weight + delta).T)
    f = lambda x: low_rank_linear(x, weight, None, branches, route=route)  # noqa: E731
    assert torch.autograd.gradcheck(f, x)


def test_a_mask_drops_inputs_of_the_branch_alone(route):
    x, weight, bias, a, b = given()
    keep = torch.rand(x.shape) > 0.5
    branch = Branch(a, b.flatten(0, 1), 0.5, 0, HEADS * HEAD_DIM)
    f = lambda x, a: low_rank_linear(x, weight, bias, [branch._replace(a=a)], keep=keep, route=route)  # noqa: E731
    expected = x @ weight.T + bias + 0.5 * (x * keep) @ a.T @ b.flatten(0, 1).T
    torch.testing.assert_close(f(x, a), expected)
    assert torch.autograd.gradcheck(f, (x, a))
    transformed = torch.func.grad(lambda x, a: f(x, a).sin().sum(), argnums=(0, 1))(x, a)
    torch.testing.assert_close(transformed, torch.autograd.grad(expected.sin().sum(), (x, a)))


def test_no_tensor_of_the_size_of_the_weight_is_formed_on_the_branch():
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    shapes.add(tuple(tensor.shape))
            return result

    shapes: set[tuple[int, ...]] = set()
    x, weight, bias, a, b = given()
    with Watch():
        hora_linear(x, weight, bias, Factors(a, b), 0.5, route="branch").sum().backward()
    transposes = {(EMBED, HEADS * HEAD_DIM)}  # views of the frozen weight
    assert not {tuple(weight.shape)} & (shapes - transposes)


def test_the_automatic_route_merges_for_many_float32_tokens_alone(monkeypatch):
    from hora_torch import linear

    seen = []
    merged = linear._Merged.apply
    monkeypatch.setattr(linear._Merged, "apply", lambda *args: seen.append(True) or merged(*args))
    for dtype, tokens, merges in ((torch.float32, 2, False), (torch.float32, 8, True), (torch.float64, 8, False)):
        seen.clear()
        x, weight, bias, a, b = given(dtype=dtype, tokens=tokens)
        hora_linear(x, weight, bias, Factors(a, b), 0.5)
        assert bool(seen) == merges
    seen.clear()
    x, weight, bias, a, b = given(dtype=torch.float32, tokens=EMBED)
    hora_linear(x[0], weight, bias, Factors(a, b), 0.5)  # as many tokens as the embed width do not outnumber it
    assert not seen


@pytest.mark.parametrize("wanted", ["no gradients", "no leaves"])
def test_what_needs_no_gradient_costs_no_autograd_function(route, wanted, monkeypatch):
    from hora_torch import linear

    for function in (linear._Branched, linear._Merged):
        monkeypatch.setattr(function, "apply", lambda *args: pytest.fail("an autograd function was called"))
    x, weight, bias, a, b = given(grad=wanted == "no gradients")
    with torch.set_grad_enabled(wanted == "no leaves"):
        y = hora_linear(x, weight, bias, Factors(a, b), 0.5, route=route)
        torch.testing.assert_close(y, plain(x, weight, bias, a, b))


@pytest.mark.parametrize("scaling", [-1.0, 0.0, 1.0, 2.0])
def test_gradients_of_any_scaling_are_those_of_the_formula(route, scaling):
    leaves = given()
    x, *_, a, b = leaves
    wrt = (x, a, b)
    got = torch.autograd.grad(hora_linear(*leaves[:3], Factors(a, b), scaling, route=route).sin().sum(), wrt)
    expected = torch.autograd.grad(plain(*leaves, scaling).sin().sum(), wrt)
    torch.testing.assert_close(got, expected)


def test_the_gradient_of_b_has_derivatives_of_its_own(route):
    """With a constant cotangent they pass through ``x A^T`` alone, not through the output."""
    leaves = x, weight, bias, a, b = given()
    cotangent, probe = torch.randn(2, 4, HEADS * HEAD_DIM, dtype=x.dtype), torch.randn_like(b)

    def second(y):
        (grad_b,) = torch.autograd.grad(y, b, cotangent, create_graph=True)
        return torch.autograd.grad((grad_b * probe).sum(), (x, a))

    torch.testing.assert_close(
        second(hora_linear(x, weight, bias, Factors(a, b), 0.5, route=route)), second(plain(*leaves))
    )


@pytest.mark.parametrize("windows", [[(0, 6), (0, 6)], [(2, 4)], [(0, 5)], [(1, 6)], [(4, 6), (0, 6), (1, 3)]], ids=str)
def test_windows_may_overlap_and_each_is_added_with_its_gradients(route, windows):
    x, weight, *_ = given()
    branches, delta = [], 0
    for i, (start, stop) in enumerate(windows):
        a, b = torch.randn(6 + i, EMBED, dtype=x.dtype), torch.randn(stop - start, 6 + i, dtype=x.dtype)
        branches.append(Branch(a.requires_grad_(), b.requires_grad_(), 1.0 + i, start, stop))
        delta = delta + nn.functional.pad(branches[-1].scaling * b @ a, (0, 0, start, 6 - stop))
    wrt = [x, *(factor for branch in branches for factor in branch[:2])]
    y, expected = low_rank_linear(x, weight, None, branches, route=route), x @ (weight + delta).T
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(add_branches(x @ weight.T, x, branches), expected)
    torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), wrt), torch.autograd.grad(expected.sin().sum(), wrt))


@pytest.mark.parametrize("shape", [(2, 3, 6), (3, 4, 6), (2, 4, 5), (8, 6)], ids=str)
def test_branches_on_an_output_of_another_shape_are_refused(shape):
    x, _, _, a, b = given()
    with pytest.raises(HoraError, match="gathered or sharded"):
        add_branches(torch.zeros(shape), x, [Branch(a, b.flatten(0, 1), 1.0, 0, 6)])


@pytest.mark.parametrize(
    "hook",
    [
        lambda module: module.register_forward_hook(print),
        lambda module: module.register_forward_pre_hook(print),
        lambda module: module.register_full_backward_hook(print),
        lambda module: module.register_full_backward_pre_hook(print),
        lambda module: setattr(module, "forward", print),
    ],
)
def test_one_hook_of_any_kind_is_a_hook(hook):
    module = nn.Linear(2, 2)
    assert not has_hooks(module)
    hook(module)
    assert has_hooks(module)
