"""The adapted linear map as one differentiable operation, by two routes that never form a dense weight gradient.

Shapes: n tokens, D embed, O output rows of the stored weight, R the ranks of all branches together.
``branch``: ``y = x W^T + bias``, then ``y[:, window] += scaling * (x A^T) B^T`` in place.
``merge``: ``y = x (W + delta)^T + bias`` with the same low-rank gradients; the merged weight is rebuilt for backward.
For few tokens and under transforms the branch is made of single operations, without a Function.

What has R rows is kept as (R, n), never (n, R): BLAS multiplies a wide matrix from the left up to ten times as fast as
a tall one from the right (measured with MKL, R = 8).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from hora_spec import HoraError
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

Route = Literal["auto", "branch", "merge"]

_FEW = 2**16  # numbers in x up to which single operations take less time than a Function


class Branch(NamedTuple):
    """One low-rank addition to the output columns ``start:stop``: ``scaling * x a^T b^T``.

    ``a`` is (rank, embed), ``b`` (stop - start, rank).
    """

    a: Tensor
    b: Tensor
    scaling: float
    start: int
    stop: int


class _Window(NamedTuple):
    """Output columns of a branch, and its columns in the stacked ``u = x A^T``."""

    start: int
    stop: int
    first: int
    last: int
    scaling: float


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branches: Sequence[Branch],
    *,
    keep: Tensor | None = None,
    route: Route = "auto",
) -> Tensor:
    """``x W^T + bias`` plus every branch.

    Parameters
    ----------
    x
        (..., embed), in the dtype of `weight` unless autocast is on.
    weight, bias
        Stored weight (rows, embed), any strides, and (rows,) or None. Frozen weights get no gradient and cost none.
    branches
        At least one; factors of any floating dtype, cast to that of `x`.
    keep
        Dropout mask on the branches' input, boolean, of the shape of `x`; the caller scales the branches.
    route
        ``"merge"`` holds for 32 bits and more without dropout, else the branch is taken; ``"auto"`` merges float32
        when tokens outnumber the embed width, and takes single operations for few tokens.

    Returns
    -------
    Tensor
        (..., rows).
    """
    if autocast_enabled(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        if x.dtype != torch.float64:
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
    merges = _merges(route, x, keep)
    few = route == "auto" and not merges and x.numel() <= _FEW
    if few or (is_observed() and not torch.compiler.is_compiling()):
        return _by_operations(x, weight, bias, branches, keep)
    windows, first = [], 0
    for branch in branches:
        last = first + branch.a.shape[0]
        windows.append(_Window(branch.start, branch.stop, first, last, branch.scaling))
        first = last
    a = branches[0].a if len(branches) == 1 else torch.cat([branch.a for branch in branches])
    a, bs = a.to(x.device, x.dtype), [branch.b.to(x.device, x.dtype) for branch in branches]
    if not _records_gradients(x, weight, bias, a, *bs):
        if merges:
            return nn.functional.linear(x, _merged_weight(weight, windows, a, bs), bias)
        return _branched(x, weight, bias, keep, windows, a, bs)[0]
    if merges:
        return _Merged.apply(x, weight, bias, tuple(windows), a, *bs)
    return _Branched.apply(x, weight, bias, keep, tuple(windows), a, *bs)[0]


def add_branches(y: Tensor, x: Tensor, branches: Sequence[Branch], *, keep: Tensor | None = None) -> Tensor:
    """Every branch added to the output `y` of any base layer, in operations that every transform of torch knows.

    For base layers that compute by themselves (quantised, hooked, sharded), and under transforms.

    Raises
    ------
    HoraError
        If `y` is not the output for `x` with all columns that the branches need.
    """
    last = max(branch.stop for branch in branches)
    if y.shape[:-1] != x.shape[:-1] or y.shape[-1] < last:
        raise HoraError(
            f"a base layer maps {tuple(x.shape)} to {(*x.shape[:-1], '>= ' + str(last))}, got {tuple(y.shape)}: its "
            "output is gathered or sharded in a way that adapters cannot follow"
        )
    a, b, scaling = _as_one(branches, y.shape[-1])
    addition = nn.functional.linear(nn.functional.linear(_kept(x, keep), a.to(x)), b.T.to(x))
    return torch.add(y, addition.to(y.dtype), alpha=scaling)


def _by_operations(
    x: Tensor, weight: Tensor, bias: Tensor | None, branches: Sequence[Branch], keep: Tensor | None
) -> Tensor:
    """In matrices, since autograd makes four nodes of a product with more axes."""
    a, b, scaling = _as_one(branches, weight.shape[0])
    rows = _rows(x)
    y = nn.functional.linear(rows, weight, bias)
    u = nn.functional.linear(rows if keep is None else rows * _rows(keep), a.to(x))
    return torch.addmm(y, u, b.to(x), alpha=scaling).view(*x.shape[:-1], weight.shape[0])


def _as_one(branches: Sequence[Branch], columns: int) -> tuple[Tensor, Tensor, float]:
    """Factors a (R, embed) and the transpose of b, (R, columns), of all branches together, and their scaling."""
    if len(branches) == 1 and branches[0].b.shape[0] == columns:
        return branches[0].a, branches[0].b.T, branches[0].scaling
    common = branches[0].scaling
    if any(branch.scaling != common for branch in branches):
        common, branches = 1.0, [branch._replace(b=branch.b * branch.scaling) for branch in branches]
    a = branches[0].a if len(branches) == 1 else torch.cat([branch.a for branch in branches])
    if all(one.stop <= other.start for one, other in pairwise(branches)):
        return a, _diagonal(branches, columns), common
    rows = [nn.functional.pad(branch.b.T, (branch.start, columns - branch.stop)) for branch in branches]
    return a, torch.cat(rows), common


def _diagonal(branches: Sequence[Branch], columns: int) -> Tensor:
    """The transposes of b one below the other, each in its columns; faster than padding each."""
    blocks, stop = [], 0
    for branch in branches:
        if branch.start > stop:
            blocks.append(branch.b.new_empty(0, branch.start - stop))
        blocks.append(branch.b.T)
        stop = branch.stop
    if columns > stop:
        blocks.append(branches[0].b.new_empty(0, columns - stop))
    return torch.block_diag(*blocks)


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`; meta has none, and to ask torch for what has one breaks a graph."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class says: hooks, or a forward that was replaced."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _merges(route: Route, x: Tensor, keep: Tensor | None) -> bool:
    """Never in 16 bits, where W + delta rounds small deltas away, nor with dropout, which acts on the branch alone."""
    if keep is not None or route == "branch" or x.dtype not in (torch.float32, torch.float64):
        return False
    return route == "merge" or (x.dtype == torch.float32 and x.numel() > x.shape[-1] ** 2)


def is_observed() -> bool:
    """Whether a compiler, torch.func, forward-mode differentiation or a tracer looks at single operations."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()  # also what Function.apply asks
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def _records_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _branched(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    windows: Sequence[_Window],
    a: Tensor,
    bs: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """``y`` and ``u = A x^T``, (R, n)."""
    y = nn.functional.linear(x, weight, bias)
    u = a @ _rows(_kept(x, keep)).T
    columns = y.view(-1, y.shape[-1])
    for (start, stop, first, last, scaling), b in zip(windows, bs, strict=True):
        columns[:, start:stop].addmm_(u[first:last].T, b.T, alpha=scaling)
    return y, u


class _Branched(Function):
    """Branch route. ``u``, (R, n), is an output so that second derivatives flow through it.

    Forward and its context are one function: with a separate ``setup_context``, torch 2.13 inspects the signature in
    every call, which takes longer than a token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        keep: Tensor | None,
        windows: tuple[_Window, ...],
        a: Tensor,
        *bs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        y, u = _branched(x, weight, bias, keep, windows, a, bs)
        ctx.windows = windows
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, keep, u, a, *bs)
        return y, u

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_u: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, keep, u, a, *bs = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, _, needs_a, *needs_bs = ctx.needs_input_grad
        if grad_y is None:  # only a second derivative can want u alone
            grad_y = x.new_zeros(*x.shape[:-1], weight.shape[0])
        g = _rows(grad_y)
        down = _grad_u(g, bs, ctx.windows)
        down = down if grad_u is None else down + grad_u
        grad_x = None
        if needs_x:
            grad_x = g @ weight
            if keep is None:
                grad_x.addmm_(down.T, a)
            else:
                grad_x += (down.T @ a) * _rows(keep)
            grad_x = grad_x.view(x.shape)
        return (
            grad_x,
            g.T @ _rows(x) if needs_weight else None,
            g.sum(0) if needs_bias else None,
            None,
            None,
            down @ _rows(_kept(x, keep)) if needs_a else None,
            *_grad_bs(g, u, ctx.windows, needs_bs),
        )


class _Merged(Function):
    """Merge-forward route: one dense product each way, gradients of the factors through the low rank."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        windows: tuple[_Window, ...],
        a: Tensor,
        *bs: Tensor,
    ) -> Tensor:
        ctx.windows = windows
        ctx.save_for_backward(x, weight, a, *bs)
        return nn.functional.linear(x, _merged_weight(weight, windows, a, bs), bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, *bs = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, needs_a, *needs_bs = ctx.needs_input_grad
        g, rows = _rows(grad_y), _rows(x)
        return (
            (g @ _merged_weight(weight, ctx.windows, a, bs)).view(x.shape) if needs_x else None,
            g.T @ rows if needs_weight else None,
            g.sum(0) if needs_bias else None,
            None,
            _grad_u(g, bs, ctx.windows) @ rows if needs_a else None,
            *_grad_bs(g, a @ rows.T, ctx.windows, needs_bs),
        )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x * keep


def _merged_weight(weight: Tensor, windows: Sequence[_Window], a: Tensor, bs: Sequence[Tensor]) -> Tensor:
    if len(windows) == 1 and windows[0].stop - windows[0].start == weight.shape[0]:
        return torch.addmm(weight, bs[0], a, alpha=windows[0].scaling)
    merged = weight.clone()
    for (start, stop, first, last, scaling), b in zip(windows, bs, strict=True):
        merged[start:stop].addmm_(b, a[first:last], alpha=scaling)
    return merged


def _grad_u(g: Tensor, bs: Sequence[Tensor], windows: Sequence[_Window]) -> Tensor:
    parts = []
    for (start, stop, _, _, scaling), b in zip(windows, bs, strict=True):
        part = b.T @ g[:, start:stop].T
        parts.append(part if scaling == 1 else part * scaling)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _grad_bs(g: Tensor, u: Tensor, windows: Sequence[_Window], needed: Sequence[bool]) -> list[Tensor | None]:
    grads: list[Tensor | None] = []
    for (start, stop, first, last, scaling), need in zip(windows, needed, strict=True):
        grad = (u[first:last] @ g[:, start:stop]).T if need else None
        grads.append(grad if grad is None or scaling == 1 else grad * scaling)
    return grads
