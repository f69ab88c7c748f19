"""Stored forms of a projection, both directions."""

import numpy as np
import pytest
from einops import rearrange
from hora_spec import HoraError, Layout, ProjectionShape, Window

SHAPE = ProjectionShape(num_heads=2, head_dim=3, embed_dim=4)
CANONICAL = np.arange(24.0).reshape(6, 4)
STACK = np.stack([CANONICAL, 100 + CANONICAL])

STORED = {
    "(h k) d": CANONICAL,
    "d (h k)": CANONICAL.T,
    "d h k": rearrange(CANONICAL, "(h k) d -> d h k", h=2),
    "h d k": rearrange(CANONICAL, "(h k) d -> h d k", h=2),
    "1 h d k": rearrange(CANONICAL, "(h k) d -> 1 h d k", h=2),
}
STACKED = {
    "l (h k) d": STACK,
    "(h k) l d": rearrange(STACK, "l i d -> i l d"),
    "d l h k": rearrange(STACK, "l (h k) d -> d l h k", h=2),
    "h d k l": rearrange(STACK, "l (h k) d -> h d k l", h=2),
}


@pytest.mark.parametrize("pattern", [*STORED, *STACKED])
def test_l4_reading_and_writing_are_inverse(pattern):
    stored, canonical = (STORED[pattern], CANONICAL) if pattern in STORED else (STACKED[pattern], STACK)
    layout = Layout(pattern)
    layout.check(stored.shape, SHAPE)
    assert layout.stacked == (pattern in STACKED)
    np.testing.assert_array_equal(layout.read(stored), canonical)
    np.testing.assert_array_equal(layout.write(canonical, stored.shape), stored)


@pytest.mark.parametrize(("pattern", "axis"), [("(h k) d", 0), ("d (h k)", 1), ("l d h k", 2), ("d h k", 1)])
def test_l2_a_window_selects_a_part_of_a_fused_weight(pattern, axis):
    part = {**STORED, "l d h k": rearrange(STACK, "l (h k) d -> l d h k", h=2)}[pattern]
    fused = np.concatenate([np.zeros_like(part), part, -np.ones_like(part)], axis=axis)
    width = part.shape[axis]
    layout = Layout(pattern, Window(axis, width, 2 * width))
    layout.check(fused.shape, SHAPE)
    np.testing.assert_array_equal(fused[layout.index()], part)
    np.testing.assert_array_equal(layout.write(layout.read(fused), fused.shape), part)
    assert layout.window_shape(fused.shape) == part.shape


@pytest.mark.parametrize(
    "pattern", ["", "h k", "(k h) d", "(h k d)", "h (k d)", "(h k) (d)", "hk d", "(h k) d l l", "d h k z", "d h h k"]
)
def test_l1_other_patterns_are_refused(pattern):
    with pytest.raises(HoraError, match=r"\(spec L1\)"):
        Layout(pattern)


@pytest.mark.parametrize("values", [(-1, 0, 1), (0, 2, 2), (0, 3, 2), (0, -1, 2)])
def test_l2_empty_windows_are_refused(values):
    with pytest.raises(HoraError, match=r"\(spec L2\)"):
        Window(*values)
    with pytest.raises(HoraError, match=r"lies outside.*\(spec L2\)"):
        Layout("(h k) d", Window(2, 0, 1))


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (Layout("d (h k)"), (6, 4)),
        (Layout("d h k"), (4, 3, 2)),
        (Layout("(h k) d"), (6, 4, 1)),
        (Layout("1 h d k"), (2, 2, 4, 3)),
        (Layout("(h k) d", Window(0, 6, 12)), (11, 4)),
        (Layout("(h k) d", Window(0, 0, 5)), (12, 4)),
    ],
)
def test_l3_weights_that_do_not_fit_are_refused(layout, shape):
    with pytest.raises(HoraError, match=r"\(spec L3\)"):
        layout.check(shape, SHAPE)
