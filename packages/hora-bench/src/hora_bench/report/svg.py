"""Figures as SVG files that are the same, byte for byte, whenever they show the same."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

from hora_bench.cache import new_file

GREY: Final = "#808080"  # legible on white and on black
STABLE: Final[Any] = {"svg.hashsalt": "hora", "svg.fonttype": "none", "savefig.transparent": True}
CLIP: Final = re.compile(r"\bp[0-9a-f]{10}\b")


def save(figure: Figure, path: Path) -> None:
    """Write a figure.

    matplotlib (3.11) names clip paths after a digest of coordinates in full precision, whose last bit depends on the
    processor; here they are numbered.
    """
    for text in figure.findobj(Text):
        text.set_color(GREY)
    for axis in figure.axes:
        axis.tick_params(colors=GREY)
        for spine in axis.spines.values():
            spine.set_edgecolor(GREY)
    drawn = StringIO()
    with matplotlib.rc_context(STABLE):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    numbers: dict[str, str] = {}
    text = CLIP.sub(lambda found: numbers.setdefault(found.group(), f"clip{len(numbers)}"), drawn.getvalue())
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
