"""Self-contained HTML pages: tables, plots and notes; no script, no request to anywhere."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from hora_bench.cache import new_file

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


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with a table, plots (from `figure`) and notes, all optional."""

    title: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    figures: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = field(default_factory=tuple)


def figure(drawn: Any, caption: str) -> tuple[str, str]:
    """A matplotlib figure as an embedded image and its caption; the figure is closed."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(drawn)
    return base64.b64encode(buffer.getvalue()).decode(), caption


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write the page, whole or not at all."""
    body = "".join(map(_section, sections))
    write_document(path, title, f"<h1>{escape(title)}</h1><p>{escape(lead)}</p>{body}")


def write_document(path: Path, title: str, body: str) -> None:
    """Write a page whose body is HTML already."""
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )
    with new_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.rows:
        parts.append(
            "<table>" + _row(section.header, "th") + "".join(_row(row, "td") for row in section.rows) + "</table>"
        )
    for data, caption in section.figures:
        parts.append(f'<p><img alt="{escape(caption)}" src="data:image/png;base64,{data}"><br>')
        parts.append(f'<span class="note">{escape(caption)}</span></p>')
    parts += [f'<p class="note">{escape(note)}</p>' for note in section.notes]
    return "".join(parts)


def _row(cells: Sequence[Any], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
