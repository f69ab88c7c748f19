"""Merging factors into a stored weight: sum in float32 or better, rounded once (spec M1 to M3)."""

from collections.abc import Sequence

import torch
from hora_spec import HoraError, Layout
from hora_spec.layout import Span
from torch import Tensor, nn

from hora_torch.precision import exact_products

Addition = tuple[Layout, Tensor, Tensor, float]
"""Layout, a (rank, embed), b (rows of the layout, rank) and scaling of one delta."""

_CHUNK_BYTES = 1 << 20  # float32 working rows that stay in cache
_CHUNK_BYTES_OF_GPU = 1 << 28  # where each chunk costs launches


def merged_weight(
    weight: Tensor,
    additions: Sequence[Addition],
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
        Layout, a (rank, embed), b (rows, rank) and scaling of each.
    check
        Look at every entry of the result; otherwise only where the factors cannot exclude an overflow.
    name
        Name of the adapter, for the message.

    Returns
    -------
    Tensor
        Of weight's shape and dtype, on its device.

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
    shape, device = weight.shape, weight.device
    weight = weight.flatten(1)  # that of a convolution has a kernel of one
    additions = [(layout.squeezed, a.to(device), b.to(device), scaling) for layout, a, b, scaling in additions]
    limit = 0.0
    for _, a, b, scaling in additions:
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise HoraError(f"{_broken(name)}: only a finite delta can be merged, its factors are not (spec M3)")
        limit += abs(scaling) * float((a.abs().amax(1).double() * b.abs().amax(0).double()).sum())
    working = torch.float64 if weight.dtype == torch.float64 else torch.float32
    merged = weight.clone() if weight.dtype == working else torch.empty_like(weight)
    with exact_products():
        if weight.dtype == working:
            for layout, a, b, scaling in additions:
                _add(_as_rows(merged, layout), layout.rows(weight.shape), a.to(working), b.to(working), scaling)
        else:
            _merge_in_chunks(weight, merged, additions, working)
    unsafe = limit > torch.finfo(working).max / 4 or weight.dtype == torch.float16
    if (check or unsafe) and not torch.isfinite(merged).all():
        raise HoraError(
            f"{_broken(name)}: the sum leaves the range of {weight.dtype}, or the base is not finite (spec M3)"
        )
    return merged.view(shape)


def on_all_rows(b: Tensor, rows: Span) -> Tensor:
    """`b` (rows of a span, rank) among zeros for all other rows of the stored weight, (all rows, rank)."""
    return nn.functional.pad(b.unflatten(0, (rows.blocks, -1)), (0, 0, *rows.around)).flatten(0, 1)


def _add(matrix: Tensor, rows: Span, a: Tensor, b: Tensor, scaling: float) -> None:
    """``scaling * b a`` onto `rows` of a matrix; the other rows are not touched."""
    if rows.blocks == 1:
        matrix[rows.index].addmm_(b, a, alpha=scaling)
        return
    blocks = matrix.unflatten(0, (rows.blocks, -1))[:, rows.start : rows.stop]
    blocks.baddbmm_(b.unflatten(0, (rows.blocks, -1)), a.expand(rows.blocks, -1, -1), alpha=scaling)


def _broken(name: str) -> str:
    return f"NaNs detected in the merged weights. The adapter {name} seems to be broken"


def _as_rows(weight: Tensor, layout: Layout) -> Tensor:
    return weight.T if layout.row_axis else weight


def _merge_in_chunks(
    weight: Tensor,
    merged: Tensor,
    additions: Sequence[Addition],
    working: torch.dtype,
) -> None:
    """Rows pass through a small float32 buffer, so that the sum costs hardly more than copying the weight."""
    source, target = (_as_rows(tensor, additions[0][0]) for tensor in (weight, merged))
    chunk = _CHUNK_BYTES if weight.device.type == "cpu" else _CHUNK_BYTES_OF_GPU
    step = max(1, chunk // (4 * source.shape[1]))
    pieces = [
        piece
        for layout, a, b, scaling in additions
        for piece in _contiguous(layout.rows(weight.shape), a.to(working), b.to(working), scaling)
    ]
    for first in range(0, source.shape[0], step):
        last = min(first + step, source.shape[0])
        buffer = source[first:last].to(working)
        for start, stop, a, b, scaling in pieces:
            low, high = max(first, start), min(last, stop)
            if low < high:
                buffer[low - first : high - first].addmm_(b[low - start : high - start], a, alpha=scaling)
        target[first:last] = buffer


def _contiguous(rows: Span, a: Tensor, b: Tensor, scaling: float) -> list[tuple[int, int, Tensor, Tensor, float]]:
    """Start and stop of each run of rows, and the factors there."""
    size = rows.stop - rows.start
    starts = range(rows.start, rows.size, rows.size // rows.blocks)
    return [(start, start + size, a, part, scaling) for start, part in zip(starts, b.split(size), strict=True)]
