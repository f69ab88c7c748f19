"""Convolutions that are linear maps of channels: a kernel of one, in one group or several."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hora_torch.adapted_linear import HoraLinear
from hora_torch.linear import Branch


class HoraConv(HoraLinear):
    """``conv(x, W) + bias + scaling * conv(conv(x, A), B)`` for Conv1d, Conv2d and Conv3d with a kernel of one.

    In groups, A is common to all of them: it is that of the stored weight (out, in / groups), whose rows are those of
    all groups (spec D2).
    """

    def input_of(self, projection: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """What a projection reads in a call with these arguments, (..., groups, embed)."""
        base, x = self.get_base_layer(), args[0] if args else kwargs["x"]
        return _positions(x, base.stride).unflatten(-1, (base.groups, -1))

    def _add(self, result: Any, x: Tensor, branches: list[Branch], keep: Tensor | None = None) -> Tensor:
        """As that of a linear map of what each position holds, channels last."""
        base = self.get_base_layer()
        x, keep = _positions(x, base.stride), None if keep is None else _positions(keep, base.stride)
        y = result.movedim(-1 - len(base.stride), -1)
        if base.groups == 1:
            y = super()._add(y, x, branches, keep)
        else:
            rows = base.out_channels // base.groups
            whole = [_on_all_rows(branch, base.out_channels).chunk(base.groups) for branch in branches]
            parts = []
            for i, (part, own) in enumerate(zip(y.split(rows, -1), x.chunk(base.groups, -1), strict=True)):
                mine = [branch._replace(b=b[i], start=0, stop=rows) for branch, b in zip(branches, whole, strict=True)]
                dropped = None if keep is None else keep.chunk(base.groups, -1)[i]
                parts.append(super()._add(part, own, mine, dropped))
            y = torch.cat(parts, -1)
        return y.movedim(-1, -1 - len(base.stride))


def _positions(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """What a kernel of one sees at each of its positions, channels last."""
    return x[(..., *(slice(None, None, step) for step in stride))].movedim(-1 - len(stride), -1)


def _on_all_rows(branch: Branch, rows: int) -> Tensor:
    return nn.functional.pad(branch.b, (0, 0, branch.start, rows - branch.stop))
