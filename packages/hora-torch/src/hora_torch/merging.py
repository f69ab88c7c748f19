"""Merging factors into a stored weight: sum in float32 or better, rounded once (spec M1 to M3)."""

from collections.abc import Sequence

import torch
from hora_spec import HoraError, Layout
from torch import Tensor

_CHUNK_BYTES = 1 << 20  # float32 working rows that stay in cache


def merged_weight(
    weight: Tensor,
    additions: Sequence[tuple[Layout, Tensor, Tensor, float]],
    *,
    check: bool = False,
    name: str = "default",
) -> Tensor:
    """A new stored weight with every ``scaling * b a`` added in its window.

    Parameters
    ----------
    weight
        The stored weight, (rows, embed) or for a Conv1D (embed, rows), floating; unchanged.
    additions
        Layout, a (rank, embed), b (window rows, rank) and scaling of each.
    check
        Look at every entry of the result; otherwise only where the factors cannot exclude an overflow.
    name
        Name of the adapter, for the message.

    Returns
    -------
    Tensor
        Of weight's shape and dtype.

    Raises
    ------
    HoraError
        If the weight is not floating, a factor is not finite, or the sum leaves the range of weight's dtype.
    """
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise HoraError(
            f"only a floating base of 16 bits or more can be merged into, got {weight.dtype}: load the base in its "
            "full dtype, or serve the adapter as LoRA with hora_torch.export_lora (spec M1)"
        )
    limit = 0.0
    for _, a, b, scaling in additions:
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise HoraError(f"{_broken(name)}: only a finite delta can be merged, its factors are not (spec M3)")
        limit += scaling * float((a.abs().amax(1).double() * b.abs().amax(0).double()).sum())
    working = torch.float64 if weight.dtype == torch.float64 else torch.float32
    merged = weight.clone() if weight.dtype == working else torch.empty_like(weight)
    if weight.dtype == working:
        for layout, a, b, scaling in additions:
            _as_rows(merged, layout)[_rows(layout)].addmm_(b.to(working), a.to(working), alpha=scaling)
    else:
        _merge_in_chunks(weight, merged, additions, working)
    unsafe = limit > torch.finfo(working).max / 4 or weight.dtype == torch.float16
    if (check or unsafe) and not torch.isfinite(merged).all():
        raise HoraError(
            f"{_broken(name)}: the sum leaves the range of {weight.dtype}, or the base is not finite (spec M3)"
        )
    return merged


def _broken(name: str) -> str:
    return f"NaNs detected in the merged weights. The adapter {name} seems to be broken"


def _rows(layout: Layout) -> slice:
    """Rows of the projection in the canonical (rows, embed) view of the stored weight."""
    return slice(None) if layout.window is None else slice(layout.window.start, layout.window.stop)


def _as_rows(weight: Tensor, layout: Layout) -> Tensor:
    return weight.T if layout.axes[0] == "d" else weight


def _merge_in_chunks(
    weight: Tensor,
    merged: Tensor,
    additions: Sequence[tuple[Layout, Tensor, Tensor, float]],
    working: torch.dtype,
) -> None:
    """Rows pass through a small float32 buffer, so that the sum costs hardly more than copying the weight."""
    source, target = (_as_rows(tensor, additions[0][0]) for tensor in (weight, merged))
    step = max(1, _CHUNK_BYTES // (4 * source.shape[1]))
    factors = [(_rows(layout), a.to(working), b.to(working), scaling) for layout, a, b, scaling in additions]
    for first in range(0, source.shape[0], step):
        last = min(first + step, source.shape[0])
        buffer = source[first:last].to(working)
        for rows, a, b, scaling in factors:
            start, stop, _ = rows.indices(source.shape[0])
            low, high = max(first, start), min(last, stop)
            if low < high:
                buffer[low - first : high - first].addmm_(b[low - start : high - start], a, alpha=scaling)
        target[first:last] = buffer
