"""The picture that stands beside a link to the site: 1200 x 630 pixels, drawn when the site is staged."""

import io
import re
import struct
from functools import cache
from pathlib import Path

PLACE, SIZE = "assets/card.png", (1200, 630)
BLUE, INK, PAPER = "#3f6fd1", "#1f2328", "#ffffff"
NAMED = re.compile(r'<meta (?:property|name)="(?:og|twitter):image" content="([^"]+)"')


@cache
def picture() -> bytes:
    """Name, method and what it runs on, as PNG; in matplotlib's own font, so that it is the same everywhere."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    figure = Figure(figsize=(SIZE[0] / 100, SIZE[1] / 100), dpi=100, facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, SIZE[0]), ylim=(SIZE[1], 0))
    axes.set_axis_off()

    def box(x, y, width, text, filled=True):
        style = (
            {"facecolor": BLUE, "edgecolor": BLUE} if filled else {"facecolor": "none", "edgecolor": INK, "ls": "--"}
        )
        axes.add_patch(FancyBboxPatch((x, y), width, 50, boxstyle="round,pad=0,rounding_size=8", lw=2.5, **style))
        color = PAPER if filled else INK
        axes.text(x + width / 2, y + 26, text, size=19, ha="center", va="center", color=color)

    def write(y, text, size, **style):
        axes.text(70, y, text, size=size, color=INK, va="baseline", family="DejaVu Sans", **style)

    write(140, "HoRA", 62, weight="bold")
    write(205, "Hyper-shared low-rank adaptation for PyTorch and JAX", 23)
    write(575, "The heads of a projection share A, and the network that writes every B.", 20)
    box(70, 405, 150, "A")
    box(290, 345, 840, "one hypernetwork for each attention layer")
    for head, left in enumerate((290, 510, 730, 950)):
        box(left, 265, 180, f"$E_{head + 1}$")
        box(left, 425, 180, f"$B_{head + 1}$", filled=False)
        for top, bottom in ((317, 343), (397, 423)):
            ends = (left + 90, top), (left + 90, bottom)
            axes.add_patch(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=14, lw=2, color=INK))
    stored = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stored, metadata={"Software": None})
    return stored.getvalue()


def size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header of a PNG file."""
    return struct.unpack(">II", png[16:24]) if png.startswith(b"\x89PNG") else (0, 0)


def fault(site: Path) -> str | None:
    """What is wrong with the picture that the built first page names, if anything."""
    named = NAMED.findall((site / "index.html").read_text())
    if len(named) != 2 or not all(address.endswith(PLACE) for address in named):
        return f"the first page must name {PLACE} for og and twitter, got {named}: see .ci/theme/main.html"
    found = size((site / PLACE).read_bytes())
    return None if found == SIZE else f"{PLACE} must have {SIZE} pixels, got {found}"
