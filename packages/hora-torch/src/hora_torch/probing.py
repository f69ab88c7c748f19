"""Which rows of an attention's projections act on one head, told by gradients alone.

The context of an attention, what its output projection reads, is differentiated by the outputs of its projections. A
column of the context depends on the rows of q and k of one head, all of them, and on one row of v.
"""

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from hora_spec import ProjectionShape, Site
from torch import Tensor, nn

from hora_torch.targets import base_module, is_supported


@dataclass(slots=True)
class Record:
    """The last call of one attention module: projections as leaves of a graph, and what may be the context."""

    leaves: dict[str, Tensor] = field(default_factory=dict)
    candidates: list[Tensor] = field(default_factory=list)


@contextmanager
def recorded(model: nn.Module, attentions: Mapping[str, set[str]]) -> Generator[dict[str, Record], None, None]:
    """Records of the calls of attention modules: path to the names of the children that are adapted."""
    records = {path: Record() for path in attentions}
    with ExitStack() as stack:
        for path, adapted in attentions.items():
            attention, record = model.get_submodule(path), records[path]
            for name, child in attention.named_children():
                if not is_supported(base_module(child)):
                    continue
                hook = _leaf(record, name) if name in adapted else _input(record)
                stack.enter_context(child.register_forward_hook(hook))
            stack.enter_context(attention.register_forward_hook(_output(record)))
        yield records


def rows_of_one_head(record: Record, sites: Mapping[str, Site], names: Mapping[str, str]) -> str | None:
    """What is wrong with the planned rows and heads of an attention; empty if nothing, None if it cannot be told.

    Parameters
    ----------
    record
        Of a call of the attention.
    sites
        Projection to place.
    names
        Projection to the name of the child that holds it.
    """
    roles = {p: role for p in sites if (role := p.rpartition("_")[2]) in ("q", "k", "v")}
    sites = {p: sites[p] for p in roles}
    context = _context(record)
    if context is None or "q" not in roles.values():  # any split of values alone looks right
        return None
    shapes = {roles[p]: site.projection for p, site in sites.items()}
    if fault := _width_fault(shapes, context.shape[-1]):
        return fault
    weights = torch.randn(context.shape[:-1], generator=torch.Generator().manual_seed(0)).to(context)
    leaves, seen = list(record.leaves.values()), set()
    for column in _columns(context.shape[-1]) if context.requires_grad else ():
        value = (context[..., column] * weights).sum()
        grads = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        reached = {name: _used(grad) for name, grad in zip(record.leaves, grads, strict=True) if grad is not None}
        heads = set()
        for p, site in sites.items():
            if names[p] not in reached:
                continue
            rows, shape = site.layout.rows(site.weight_shape), site.projection
            used = reached[names[p]][rows.index].nonzero().flatten()
            if len(used) == shape.num_heads * shape.head_dim and shape.num_heads > 1:
                continue  # a norm over all heads, or heads that talk: every row acts on every head
            touched, expected = set((used // shape.head_dim).tolist()), 1 if roles[p] == "v" else shape.head_dim
            if len(touched) != 1 or len(used) != expected:
                return (
                    f"a head of the attention depends on {expected} rows of {p} in one planned head, got {len(used)} "
                    f"in {len(touched)}"
                )
            seen.add(p)
            fewest = min(shape.num_heads for shape in shapes.values())
            heads.add(touched.pop() * fewest // shape.num_heads)
        if len(heads) > 1:
            return "q and v of one head are planned as different heads"
    return "" if seen == sites.keys() else None


def _width_fault(shapes: Mapping[str, ProjectionShape], width: int) -> str:
    """The context of all heads of q is as wide as their values; linear attention may have more heads of v than of q."""
    if "v" not in shapes or shapes["v"].num_heads > shapes["q"].num_heads:
        return ""
    planned = shapes["q"].num_heads * shapes["v"].head_dim
    return "" if planned == width else f"the planned heads of q and v make a context of {planned} columns, got {width}"


def _columns(width: int) -> list[int]:
    return sorted({0, 1, width // 2 - 1, width // 2, width - 1} & set(range(width)))


def _leaf(record: Record, name: str) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        record.leaves[name] = leaf = output.detach().requires_grad_()
        return leaf.clone()  # which a model may write into

    return hook


def _input(record: Record) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
        if args and isinstance(args[0], Tensor):
            record.candidates.append(args[0])

    return hook


def _output(record: Record) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        output = output if isinstance(output, Tensor) else next((x for x in output if isinstance(x, Tensor)), None)
        if output is not None:
            record.candidates.append(output)

    return hook


def _context(record: Record) -> Tensor | None:
    """The first tensor after the projections that depends on them."""
    leaves = list(record.leaves.values())
    for tensor in record.candidates:
        if tensor.requires_grad and leaves:
            grads = torch.autograd.grad(tensor.sum(), leaves, retain_graph=True, allow_unused=True)
            if any(grad is not None for grad in grads):
                return tensor
    return None


def _used(grad: Tensor) -> Tensor:
    """Rows that a gradient reaches, (rows,)."""
    largest = grad.abs().flatten(0, -2).amax(0)
    return largest > 1e-6 * largest.max()
