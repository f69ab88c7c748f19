"""Records of results as Markdown: cells, tables, links and images."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

MEDIA: Final = "data:image/svg+xml;base64,"


def cell(value: Any) -> str:
    """A value as text: nothing for None, and an estimate with its bounds as ``0.9 (0.8 to 1.0)``."""
    if value is None:
        return ""
    if isinstance(value, dict):
        estimate, low, high = value.values()
        return f"{estimate}" if low is None else f"{estimate} ({low} to {high})"
    return f"{value}"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a table, and an empty one before and after."""
    body = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return ["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header), *body, ""]


def link(path: Path, page: Path) -> str:
    """A link from a page to a file, by its name."""
    return f"[{path.name}]({Path(os.path.relpath(path, page.parent)).as_posix()})"


def embedded(image: Path) -> str:
    """An SVG file as a link that holds it."""
    return MEDIA + b64encode(image.read_bytes()).decode()


def folded(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A table that is opened by its title, where pages can fold."""
    return [f'<details markdown="1"><summary>{title}</summary>', *table(header, rows), "</details>", ""]
