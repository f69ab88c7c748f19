"""Tables that fit the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table

FRAME: Final = 2  # between columns


def show_table(
    console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, keys: int = 1
) -> None:
    """Print a table; columns for which there is no room follow below, beside the same keys.

    Parameters
    ----------
    console
        Its width is the room.
    title
        Over the table.
    header, rows
        Cells; a cell may have several lines.
    keys
        So many leading columns name a row; their text folds where it would take much of the room.
    """
    room = console.width - FRAME
    widths = [max(map(cell_len, "\n".join(column).split("\n"))) + FRAME for column in zip(header, *rows, strict=True)]
    widths[:keys] = [min(width, room // max(3, 1 + keys)) for width in widths[:keys]]
    for part, chosen in enumerate(_parts(widths, keys, room)):
        columns = (
            Column(header[i], justify="left", overflow="fold", max_width=widths[i] - FRAME)
            if i < keys
            else Column(header[i], justify="right", overflow="fold")
            for i in chosen
        )
        table = Table(*columns, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for row in rows:
            table.add_row(*(row[i] for i in chosen))
        console.print(f"{title}, continued" if part else title, style="bold", highlight=False)
        console.print(table)


def _parts(widths: Sequence[int], keys: int, room: int) -> Iterator[list[int]]:
    """Columns that fit beside each other, the keys first; one that is too wide alone folds its text."""
    part = first = list(range(keys))
    for column in range(keys, len(widths)):
        if part != first and sum(widths[i] for i in [*part, column]) > room:
            yield part
            part = first
        part = [*part, column]
    yield part
