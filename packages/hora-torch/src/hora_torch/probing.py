"""What an attention computes with the rows of its projections, seen in gradients alone: no name and no plan is asked.

The context, what the output projection reads, is differentiated by the outputs of the projections. In softmax attention
a column of it depends on *wide* rows, all those of q and k in one head, which reach the columns beside it too, and on
one *narrow* row, of v, which does not. Of the wide rows those of q are *local*: a position of the context depends on q
there alone. And a softmax couples its rows: the derivative by one is not constant in any other. Where an attention is
not so, `UntoldError` says why: nothing can be said of its rows.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hora_torch.targets import base_module, is_supported

Masks = dict[str, Tensor]


class UntoldError(Exception):
    """Why gradients tell nothing about an attention; never seen outside of ``verify``."""


@dataclass(slots=True)
class Record:
    """The last call of one attention module: outputs of projections, as leaves, and what may be the context."""

    leaves: dict[str, list[Tensor]] = field(default_factory=dict)
    candidates: list[Tensor] = field(default_factory=list)

    def outputs(self) -> list[tuple[str, Tensor]]:
        """All leaves with the names of their modules, which may be called more than once."""
        return [(name, leaf) for name, leaves in self.leaves.items() for leaf in leaves]


@contextmanager
def recorded(
    model: nn.Module, attentions: Mapping[str, set[str]], *, norms: bool
) -> Generator[dict[str, Record], None, None]:
    """Records of calls of attention modules: path to the names of the adapted children; `norms` inside may be skipped.

    A norm joins rows that nothing else joins, and changes neither their places nor their number.
    """
    records = {path: Record() for path in attentions}
    with ExitStack() as stack:
        for path, adapted in attentions.items():
            attention, record = model.get_submodule(path), records[path]
            stack.enter_context(attention.register_forward_pre_hook(_forgets(record)))
            for name, module in attention.named_modules():
                if name in adapted:
                    stack.enter_context(module.register_forward_hook(_leaf(record, name)))
                elif is_supported(base_module(module)):
                    stack.enter_context(module.register_forward_hook(_input(record)))
                elif not norms and _is_norm(module):
                    stack.enter_context(module.register_forward_hook(lambda _, args, y: args[0].to(y.dtype)))
            stack.enter_context(attention.register_forward_hook(_output(record)))
        yield records


class Probe:
    """The context of one attention, and the rows on which its columns depend."""

    def __init__(self, record: Record, context: Tensor) -> None:
        self._outputs, self._context = record.outputs(), context
        self._weights = torch.randn(context.shape[:-1], generator=torch.Generator().manual_seed(0)).to(context)
        self._used: dict[int, Masks] = {}
        self._counted: dict[int, list[Masks]] = {}

    @property
    def width(self) -> int:
        """Columns of the context."""
        return self._context.shape[-1]

    def column(self, index: int) -> tuple[Masks, Masks]:
        """Wide and narrow rows of a column, (rows,) for each module.

        Raises
        ------
        UntoldError
            If it does not depend on wide rows, or on more than one narrow row, or on one that carries nothing.
        """
        own = self._reached(index)
        beside = [self._reached(other) for other in (index - 1, index + 1) if 0 <= other < self.width]
        shared = {name: sum((rows[name] for rows in beside), torch.zeros_like(own[name])) for name in own}
        wide = {name: own[name] & shared[name] for name in own}
        narrow = {name: own[name] & ~shared[name] for name in own}
        if not _count(wide):
            raise UntoldError("no row acts on a whole head, as queries do that have more than one key")
        if _count(narrow) > 1:
            raise UntoldError("more rows than one act on one column alone, as gates beside values do")
        if _count(narrow) and not any(bool((rows & self._carried(index)[name]).any()) for name, rows in narrow.items()):
            raise UntoldError("the row that acts on one column alone is read at its own position, as that of a gate is")
        return wide, narrow

    def local(self, index: int) -> Masks:
        """Wide rows of a column that act on their own position alone: queries.

        Raises
        ------
        UntoldError
            If there are none, or they belong to no softmax of their own.
        """
        wide, _ = self.column(index)
        local = {name: torch.zeros_like(rows) for name, rows in wide.items()}
        for positions in self._positions(index):
            if any(bool((count > 1).any()) for count in positions.values()):  # else it sees itself alone
                local = {name: rows | (positions[name] == 1) & wide[name] for name, rows in local.items()}
        if not _count(local):
            raise UntoldError("no row acts on its own position alone, as queries do that no others are mixed into")
        self._check_coupling(index, wide, local)
        return local

    def _check_coupling(self, index: int, wide: Masks, local: Masks) -> None:
        name = next(name for name, rows in local.items() if rows.any())
        row = int(local[name].nonzero()[0])
        coupled = {own: torch.zeros_like(rows) for own, rows in wide.items()}
        try:
            for own, grad in self._gradients(self._sum(index), create_graph=True):
                if own == name and grad.requires_grad:
                    for other, second in self._gradients(grad[..., row].square().sum()):
                        coupled[other] |= _any_position(second)
        except RuntimeError as error:
            raise UntoldError(f"it cannot be differentiated twice, try attn_implementation='eager': {error}") from error
        if any(bool((wide[own] & ~coupled[own]).any()) for own in wide):
            raise UntoldError("its rows do not share one softmax: attentions are added, or channels attend to channels")

    def _carried(self, index: int) -> Masks:
        """Rows that act on another position than their own."""
        seen = self._positions(index)
        return {name: torch.stack([positions[name] > 1 for positions in seen]).any(0) for name in seen[0]}

    def _positions(self, index: int) -> list[Masks]:
        """From how many positions each row acts on a column, at some positions of it."""
        if index not in self._counted:
            flat = self._context[..., index].flatten()
            self._counted[index] = []
            for position in sorted({len(flat) - 1, len(flat) // 2, len(flat) // 4}):  # some may be padding
                counts = {name: torch.zeros(leaf.shape[-1], dtype=torch.long) for name, leaf in self._outputs}
                for name, grad in self._gradients(flat[position]):
                    counts[name] += (grad.flatten(0, -2) != 0).sum(0).cpu()
                self._counted[index].append(counts)
        return self._counted[index]

    def _reached(self, index: int) -> Masks:
        if index not in self._used:
            masks = {name: torch.zeros(leaf.shape[-1], dtype=torch.bool) for name, leaf in self._outputs}
            for name, grad in self._gradients(self._sum(index)):
                masks[name] |= _any_position(grad)
            self._used[index] = masks
        return self._used[index]

    def _sum(self, index: int) -> Tensor:
        return (self._context[..., index] * self._weights).sum()

    def _gradients(self, value: Tensor, *, create_graph: bool = False) -> list[tuple[str, Tensor]]:
        settings = {"retain_graph": True, "allow_unused": True, "create_graph": create_graph}
        grads = torch.autograd.grad(value, [leaf for _, leaf in self._outputs], **settings)
        named = zip(self._outputs, grads, strict=True)
        return [(name, grad.nan_to_num()) for (name, _), grad in named if grad is not None]


def probes(record: Record) -> Generator[Probe, None, None]:
    """Of all that may be the context: what depends on each projection, first that which was computed first."""
    leaves = record.outputs()
    for tensor in record.candidates:
        if leaves and tensor.requires_grad:
            grads = torch.autograd.grad(tensor.sum(), [x for _, x in leaves], retain_graph=True, allow_unused=True)
            reached = {name for (name, _), grad in zip(leaves, grads, strict=True) if grad is not None}
            if reached == record.leaves.keys():
                yield Probe(record, tensor)


def _is_norm(module: nn.Module) -> bool:
    plain = not [*module.children()] and all(param.ndim < 2 for param in module.parameters())
    return plain and "Norm" in type(module).__name__  # some say what else they do, as RMSNormGated


def _forgets(record: Record) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        record.leaves.clear()
        record.candidates.clear()

    return hook


def _leaf(record: Record, name: str) -> Callable[..., Tensor]:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        record.leaves.setdefault(name, []).append(leaf)
        return leaf.clone()  # which a model may write into

    return hook


def _input(record: Record) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
        if args and isinstance(args[0], Tensor):
            record.candidates.append(args[0])

    return hook


def _output(record: Record) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        output = output if isinstance(output, Tensor) else next((x for x in output if isinstance(x, Tensor)), None)
        if output is not None:
            record.candidates.append(output)

    return hook


def _any_position(grad: Tensor) -> Tensor:
    return (grad.detach() != 0).flatten(0, -2).any(0).cpu()


def _count(masks: Masks) -> int:
    return sum(int(rows.sum()) for rows in masks.values())
