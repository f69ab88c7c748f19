"""Where a projection sits inside a stored weight: an einops pattern and an optional window (spec L1 to L4)."""

import re
from dataclasses import dataclass
from typing import Any

from einops import rearrange

from hora_spec.errors import HoraError
from hora_spec.shapes import ProjectionShape

_HEADS = re.compile(r"\(\s*h\s+k\s*\)")


@dataclass(frozen=True, slots=True)
class Window:
    """The part ``start:stop`` of one axis of a stored weight (spec L2)."""

    axis: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.axis < 0 or not 0 <= self.start < self.stop:
            raise HoraError(f"a window is axis >= 0 and 0 <= start < stop, got {self} (spec L2)")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a stored weight holds the canonical weight ``(heads * head_dim, embed)`` of a projection.

    Parameters
    ----------
    pattern
        Axes of the stored weight, after the window: ``h`` heads, ``k`` head_dim, ``d`` embed, ``l`` stacked layers,
        ``1`` an axis of length one. Heads and head_dim stand apart or together as ``(h k)``.
    window
        Slice of the stored weight that holds the projection, when it shares the weight with others.

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
    """

    pattern: str = "(h k) d"
    window: Window | None = None

    def __post_init__(self) -> None:
        named = sorted(axis for axis in self.axes if axis != "1")
        if (
            [axis for axis in named if axis != "l"] not in (["d", "hk"], ["d", "h", "k"])
            or named.count("l") > 1
            or "hk" in self.pattern
        ):
            raise HoraError(
                f"a pattern names h, k and d once each, at most one l, any number of 1, and groups at most (h k), got "
                f"{self.pattern!r} (spec L1)"
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
    def _canonical(self) -> str:
        return ("l " if self.stacked else "") + ("hk d" if "hk" in self.axes else "(h k) d")

    @property
    def row_axis(self) -> int:
        """Axis of a stored matrix along which its output rows lie: 0 for ``(h k) d``, 1 for ``d (h k)``."""
        return self.axes.index("hk")

    @property
    def rows(self) -> slice:
        """Output rows that are the projection's, in the (rows, embed) form of a stored matrix."""
        return slice(None) if self.window is None else slice(self.window.start, self.window.stop)

    def index(self) -> tuple[slice, ...]:
        """Index of the window in the stored weight; ``weight[layout.index()]`` is the projection's part (spec L2)."""
        if self.window is None:
            return (slice(None),)
        return (slice(None),) * self.window.axis + (slice(self.window.start, self.window.stop),)

    def window_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the window of a stored weight of `shape`."""
        if self.window is None:
            return tuple(shape)
        axis = self.window.axis
        return (*shape[:axis], self.window.stop - self.window.start, *shape[axis + 1 :])

    def check(self, shape: tuple[int, ...], projection: ProjectionShape) -> None:
        """Raise unless a stored weight of `shape` can hold `projection` in this layout (spec L3)."""
        sizes = {"h": projection.num_heads, "k": projection.head_dim, "d": projection.embed_dim, "1": 1}
        sizes["hk"] = sizes["h"] * sizes["k"]
        if len(shape) != len(self.axes):
            raise HoraError(f"{self.pattern!r} describes {len(self.axes)} axes, got shape {tuple(shape)} (spec L3)")
        if self.window is not None and self.window.stop > shape[self.window.axis]:
            raise HoraError(f"{self.window} ends outside a weight of shape {tuple(shape)} (spec L3)")
        window = self.window_shape(shape)
        expected = tuple(sizes.get(axis, got) for axis, got in zip(self.axes, window, strict=True))
        if window != expected:
            raise HoraError(
                f"{self.pattern!r} with {projection} needs shape {expected}, got {window}"
                f"{'' if self.window is None else f' in {self.window}'}: is the weight transposed, or the head count "
                "wrong? (spec L3)"
            )

    def read(self, stored: Any) -> Any:
        """Canonical ``(heads * head_dim, embed)`` form of the window of `stored`; ``l`` leads if stacked (spec L4)."""
        return rearrange(stored[self.index()], f"{' '.join(self.axes)} -> {self._canonical}")

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
            Of shape ``window_shape(shape)``, to be put at ``stored[layout.index()]``.
        """
        sizes = dict(zip(self.axes, self.window_shape(shape), strict=True))
        known = {axis: sizes[axis] for axis in ("h", "k") if axis in sizes}
        return rearrange(canonical, f"{self._canonical} -> {' '.join(self.axes)}", **known)
