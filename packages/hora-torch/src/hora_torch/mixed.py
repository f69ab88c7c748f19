"""Batches whose samples have adapters of their own."""

from collections.abc import Callable, Collection, Sequence
from itertools import groupby

import torch
from torch import Tensor

Add = Callable[[str, Tensor, Tensor], Tensor]
"""Of an adapter, and the outputs and inputs of its samples: those outputs with what the adapter adds."""


def add_by_sample(y: Tensor, x: Tensor, names: Sequence[str], present: Collection[str], add: Add) -> Tensor:
    """`y` with what the adapter of each sample adds; each adapter that is `present` is asked once.

    Samples are sorted by adapter and brought back, in one operation each and not one per adapter, and in none where
    they are sorted.

    Parameters
    ----------
    y, x
        Output and input of a base layer, samples first.
    names
        Adapter of each sample.
    present
        Adapters that add anything; other samples stay as they are.
    add
        Of the samples of one adapter.
    """
    if not any(name in present for name in names):
        return y
    first = {name: place for place, name in reversed([*enumerate(names)])}
    order = sorted(range(len(names)), key=lambda sample: first[names[sample]])
    found = [(name, len([*group])) for name, group in groupby(names[sample] for sample in order)]
    if in_order := order == [*range(len(order))]:
        ys, xs = y, x
    else:
        index = torch.tensor(order, device=x.device)
        ys, xs = y.index_select(0, index), x.index_select(0, index)
    sizes = [size for _, size in found]
    parts = [
        add(name, own, inputs) if name in present else own
        for (name, _), own, inputs in zip(found, ys.split(sizes), xs.split(sizes), strict=True)
    ]
    result = torch.cat(parts)
    return result if in_order else result.index_select(0, index.argsort())
