"""Where a projection sits inside a stored weight: an einops pattern and an optional window (spec L1 to L4)."""

import re
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from hora_spec.errors import HoraError
from hora_spec.shapes import ProjectionShape

_HEADS = re.compile(r"\(\s*h\s+k\s*\)")
_NAMED = (["d", "hk"], ["d", "h", "k"], ["d", "g", "hk"], ["d", "g", "h", "k"])
_ROWS = ("g", "h", "hk", "k")
"""Axes of output rows, the outermost first: heads are numbered group by group."""


@dataclass(frozen=True, slots=True)
class Window:
    """The part ``start:stop`` of each of `blocks` equal parts of one axis of a stored weight, in order (spec L2).

    Examples
    --------
    Three heads of width 2 whose rows come as ``[head][q k v]``: v is the last third of each of three blocks.

    >>> Window(0, 4, 6, blocks=3).span(18).positions
    array([ 4,  5, 10, 11, 16, 17])
    """

    axis: int
    start: int
    stop: int
    blocks: int = 1

    def __post_init__(self) -> None:
        if self.axis < 0 or not 0 <= self.start < self.stop or self.blocks < 1:
            raise HoraError(f"a window is axis >= 0, 0 <= start < stop and blocks >= 1, got {self} (spec L2)")

    def span(self, size: int) -> "Span":
        """The window on an axis of length `size`; HoraError if it does not fit (spec L3)."""
        if size % self.blocks or self.stop > size // self.blocks:
            raise HoraError(f"{self} ends outside an axis of length {size}, or does not divide it (spec L3)")
        return Span(self.start, self.stop, self.blocks, size)


@dataclass(frozen=True, slots=True)
class Span:
    """Positions ``start:stop`` of each of `blocks` equal parts of an axis of length `size`, in order (spec L2).

    All of the axis is one block, however it was written.
    """

    start: int
    stop: int
    blocks: int
    size: int

    def __post_init__(self) -> None:
        if self.blocks > 1 and self.stop - self.start == self.size // self.blocks:
            for name, value in (("start", 0), ("stop", self.size), ("blocks", 1)):
                object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return self.blocks * (self.stop - self.start)

    @property
    def around(self) -> tuple[int, int]:
        """Positions before and after the span in each block: what to pad ``(blocks, stop - start)`` with."""
        return self.start, self.size // self.blocks - self.stop

    @property
    def positions(self) -> NDArray[np.intp]:
        """All positions, in the order of the projection."""
        return np.arange(self.size).reshape(self.blocks, -1)[:, self.start : self.stop].ravel()

    @property
    def index(self) -> slice | NDArray[np.intp]:
        """What to index the axis with: a slice where one block holds the span."""
        return slice(self.start, self.stop) if self.blocks == 1 else self.positions

    def __str__(self) -> str:
        parts = "" if self.blocks == 1 else f" of each {self.size // self.blocks} of {self.size}"
        return f"{self.start}:{self.stop}{parts}"


@dataclass(frozen=True, slots=True)
class Layout:
    """How a stored weight holds the canonical weight ``(heads * head_dim, embed)`` of a projection.

    Parameters
    ----------
    pattern
        Axes of the stored weight, after the window: ``h`` heads, ``k`` head_dim, ``d`` embed, ``l`` stacked layers,
        ``1`` an axis of length one. Heads and head_dim stand apart or together as ``(h k)``. Heads may be split in two
        axes, ``g`` groups and ``h`` heads in each; they are numbered group by group, wherever the axes stand.
    window
        Part of the stored weight that holds the projection, when it shares the weight with others.

    Notes
    -----
    Works on NumPy, torch and JAX arrays alike, under tracing too. Rules L1 to L4.

    Examples
    --------
    >>> import numpy as np
    >>> fused = np.arange(24).reshape(6, 4)  # rows q, k, v of two heads of width one
    >>> Layout("(h k) d", Window(0, 4, 6)).read(fused)
    array([[16, 17, 18, 19],
           [20, 21, 22, 23]])
    >>> Layout("(h k) d", Window(0, 2, 3, blocks=2)).read(fused)  # rows of head 0: q, k, v; then those of head 1
    array([[ 8,  9, 10, 11],
           [20, 21, 22, 23]])
    """

    pattern: str = "(h k) d"
    window: Window | None = None

    def __post_init__(self) -> None:
        named = sorted(axis for axis in self.axes if axis not in ("1", "l"))
        if sorted(named) not in map(sorted, _NAMED) or self.axes.count("l") > 1 or "hk" in self.pattern:
            raise HoraError(
                f"a pattern names h, k and d once each, at most one g, at most one l, any number of 1, and groups at "
                f"most (h k), got {self.pattern!r} (spec L1)"
            )
        if self.window is not None and self.window.axis >= len(self.axes):
            raise HoraError(f"{self.window} lies outside the {len(self.axes)} axes of {self.pattern!r} (spec L2)")

    @property
    def axes(self) -> tuple[str, ...]:
        """One name per stored axis; ``(h k)`` is ``"hk"``."""
        return tuple(_HEADS.sub("hk", self.pattern).split())

    @property
    def stacked(self) -> bool:
        """Whether the stored weight holds several layers along an axis ``l``."""
        return "l" in self.axes

    @property
    def squeezed(self) -> "Layout":
        """The same of the weight without its axes of length one."""
        pattern = " ".join({"hk": "(h k)"}.get(axis, axis) for axis in self.axes if axis != "1")
        if self.window is None:
            return Layout(pattern)
        return Layout(pattern, replace(self.window, axis=sum(axis != "1" for axis in self.axes[: self.window.axis])))

    @property
    def row_axes(self) -> tuple[str, ...]:
        """Axes of output rows in canonical order: ``("hk",)``, ``("h", "k")``, or with ``"g"`` before them."""
        return tuple(axis for axis in _ROWS if axis in self.axes)

    @property
    def row_axis(self) -> int:
        """Axis of a stored matrix along which its output rows lie: 0 for ``(h k) d``, 1 for ``d (h k)``."""
        return self.axes.index("hk")

    @property
    def _canonical(self) -> str:
        return ("l " if self.stacked else "") + f"({' '.join(self.row_axes)}) d"

    def rows(self, shape: tuple[int, ...]) -> Span:
        """Rows of the projection among all output rows of a stored weight of `shape`, which is without window.

        Output rows are numbered as in ``(g h k)``, whatever the order in which the weight stores those axes.

        Examples
        --------
        >>> Layout("d h k", Window(2, 3, 5)).rows((8, 4, 5))  # the last two rows of each of four heads of width five
        Span(start=3, stop=5, blocks=4, size=20)
        """
        sizes = dict(zip(self.axes, shape, strict=True))
        lengths = [sizes[axis] for axis in self.row_axes]
        if self.window is None or (axis := self.axes[self.window.axis]) not in self.row_axes:
            return Span(0, prod(lengths), 1, prod(lengths))
        place, span = self.row_axes.index(axis), self.window.span(sizes[axis])
        inner = prod(lengths[place + 1 :])
        return Span(span.start * inner, span.stop * inner, prod(lengths[:place]) * span.blocks, prod(lengths))

    def span(self, shape: tuple[int, ...]) -> Span | None:
        """The window on its axis of a stored weight of `shape`; None without window."""
        return None if self.window is None else self.window.span(shape[self.window.axis])

    def index(self, shape: tuple[int, ...]) -> tuple[slice | NDArray[np.intp], ...]:
        """Index of the window; ``weight[layout.index(weight.shape)]`` is the projection's part (spec L2)."""
        if self.window is None or (span := self.span(shape)) is None:
            return (slice(None),)
        return (*(slice(None),) * self.window.axis, span.index)

    def window_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the window of a stored weight of `shape`."""
        if self.window is None or (span := self.span(shape)) is None:
            return tuple(shape)
        return (*shape[: self.window.axis], len(span), *shape[self.window.axis + 1 :])

    def overlaps(self, other: "Layout", shape: tuple[int, ...]) -> bool:
        """Whether two layouts of one stored weight of `shape` have an entry in common."""
        if self.window is None or other.window is None or self.window.axis != other.window.axis:
            return True
        spans = [window.span(shape[window.axis]) for window in (self.window, other.window)]
        return bool(np.intersect1d(spans[0].positions, spans[1].positions).size)

    def check(self, shape: tuple[int, ...], projection: ProjectionShape) -> None:
        """Raise unless a stored weight of `shape` can hold `projection` in this layout (spec L3)."""
        if len(shape) != len(self.axes):
            raise HoraError(f"{self.pattern!r} describes {len(self.axes)} axes, got shape {tuple(shape)} (spec L3)")
        window = dict(zip(self.axes, self.window_shape(shape), strict=True))
        groups, heads, width = window.get("g", 1), projection.num_heads, projection.head_dim
        sizes = {"h": heads // groups, "k": width, "hk": heads // groups * width, "d": projection.embed_dim, "1": 1}
        got = self.window_shape(shape)
        expected = tuple(sizes.get(axis, size) for axis, size in zip(self.axes, got, strict=True))
        if got != expected or heads % groups:
            raise HoraError(
                f"{self.pattern!r} with {projection} needs shape {expected}, got {got}"
                f"{'' if self.window is None else f' in {self.window}'}: is the weight transposed, or the head count "
                "wrong? (spec L3)"
            )

    def read(self, stored: Any) -> Any:
        """Canonical ``(heads * head_dim, embed)`` form of the window of `stored`; ``l`` leads if stacked (spec L4)."""
        return rearrange(stored[self.index(stored.shape)], f"{' '.join(self.axes)} -> {self._canonical}")

    def write(self, canonical: Any, shape: tuple[int, ...]) -> Any:
        """Inverse of `read`: the window of a stored weight of `shape` (spec L4).

        Parameters
        ----------
        canonical
            ``(heads * head_dim, embed)``, or ``(layers, heads * head_dim, embed)`` if stacked.
        shape
            Shape of the whole stored weight.

        Returns
        -------
        array
            Of shape ``window_shape(shape)``, to be put at ``stored[layout.index(shape)]``.
        """
        sizes = dict(zip(self.axes, self.window_shape(shape), strict=True))
        known = {axis: sizes[axis] for axis in self.row_axes}
        return rearrange(canonical, f"{self._canonical} -> {' '.join(self.axes)}", **known)
