"""Results in writing: Markdown tables and links, SVG figures that are the same byte for byte, HTML pages."""

from __future__ import annotations

import os
import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

from hora_bench.cache import new_file

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


def embedded(file: Path) -> str:
    """An SVG file as a link that holds it."""
    return MEDIA + b64encode(file.read_bytes()).decode()


def folded(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A table that is opened by its title, where pages can fold."""
    return [f'<details markdown="1"><summary>{title}</summary>', *table(header, rows), "</details>", ""]


GREY: Final = "#808080"  # legible on white and on black
STABLE: Final[Any] = {"svg.hashsalt": "hora", "svg.fonttype": "none", "savefig.transparent": True}
CLIP: Final = re.compile(r"\bp[0-9a-f]{10}\b")


def drawn(figure: Figure) -> str:
    """A figure as SVG.

    matplotlib (3.11) names clip paths after a digest of coordinates in full precision, whose last bit depends on the
    processor; here they are numbered.
    """
    for text in figure.findobj(Text):
        text.set_color(GREY)
    for axis in figure.axes:
        axis.tick_params(colors=GREY)
        for spine in axis.spines.values():
            spine.set_edgecolor(GREY)
    written = StringIO()
    with matplotlib.rc_context(STABLE):
        figure.savefig(written, format="svg", metadata={"Date": None})
    numbers: dict[str, str] = {}
    return CLIP.sub(lambda found: numbers.setdefault(found.group(), f"clip{len(numbers)}"), written.getvalue())


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as an SVG file, whole or not at all; where it is."""
    with new_file(path) as temporary:
        temporary.write_text(drawn(figure), encoding="utf-8")
    return path


def image(caption: str, svg: str) -> list[str]:
    """Lines that hold a figure, and what it shows below it."""
    return ["", f"![{caption}]({MEDIA}{b64encode(svg.encode()).decode()})", "", caption, ""]


def plain(value: Any) -> str:
    """A value that comes from elsewhere as text of a cell, whatever signs it holds."""
    return escape(cell(value)).replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("\n", " ")


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
table { display: block; overflow-x: auto; }
td, th { padding: .3rem .8rem; text-align: left; vertical-align: top; border-bottom: 1px solid #8886; }
th { font-weight: 600; } summary { cursor: pointer; font-weight: 600; margin: .6rem 0; }
img { max-width: 100%; } .note { opacity: .75; } code { font-size: .9em; }
"""


def write_html(path: Path, title: str, markdown: Sequence[str]) -> None:
    """Write lines of Markdown as one HTML file that asks nobody for anything."""
    from markdown_it import MarkdownIt

    renderer = MarkdownIt("commonmark").enable("table")
    renderer.validateLink = lambda url: True  # plots are data of a kind that it does not expect
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{renderer.render(chr(10).join(markdown))}</body></html>\n"
    )
    with new_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
