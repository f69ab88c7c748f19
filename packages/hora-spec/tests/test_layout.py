"""Stored forms of a projection, both directions."""

import numpy as np
import pytest
from einops import rearrange
from hora_spec import HoraError, Layout, ProjectionShape, Window
from hora_spec.layout import Span
from hora_spec.reference import merge
from hora_spec.testing.strategies import stored_layouts
from hypothesis import given

SHAPE = ProjectionShape(num_heads=2, head_dim=3, embed_dim=4)
CANONICAL = np.arange(24.0).reshape(6, 4)
STACK = np.stack([CANONICAL, 100 + CANONICAL])

STORED = {
    "(h k) d": CANONICAL,
    "d (h k)": CANONICAL.T,
    "d h k": rearrange(CANONICAL, "(h k) d -> d h k", h=2),
    "h d k": rearrange(CANONICAL, "(h k) d -> h d k", h=2),
    "1 h d k": rearrange(CANONICAL, "(h k) d -> 1 h d k", h=2),
    "d g h k": rearrange(CANONICAL, "(g k) d -> d g 1 k", g=2),
    "h d g k": rearrange(CANONICAL, "(h k) d -> h d 1 k", h=2),
    "g (h k) d": rearrange(CANONICAL, "(g i) d -> g i d", g=2),
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
    np.testing.assert_array_equal(fused[layout.index(fused.shape)], part)
    np.testing.assert_array_equal(layout.write(layout.read(fused), fused.shape), part)
    assert layout.window_shape(fused.shape) == part.shape


OTHER_PATTERNS = [
    *("", "h k", "(k h) d", "(h k d)", "h (k d)", "(h k) (d)", "hk d", "(h k) d l l", "d h k z", "d h h k"),
    *("d g k", "g d g h k", "(g h k) d", "(g h) k d"),
]


@pytest.mark.parametrize("pattern", OTHER_PATTERNS)
def test_l1_other_patterns_are_refused(pattern):
    with pytest.raises(HoraError, match=r"\(spec L1\)"):
        Layout(pattern)


@pytest.mark.parametrize("values", [(-1, 0, 1), (0, 2, 2), (0, 3, 2), (0, -1, 2), (0, 0, 1, 0), (0, 0, 1, -2)])
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
        (Layout("(h k) d", Window(0, 0, 3, blocks=2)), (13, 4)),
        (Layout("(h k) d", Window(0, 3, 6, blocks=2)), (10, 4)),
        (Layout("(h k) d", Window(0, 0, 3, blocks=3)), (12, 4)),
        (Layout("d g h k"), (4, 3, 1, 3)),
        (Layout("d g h k"), (4, 2, 2, 3)),
    ],
)
def test_l3_weights_that_do_not_fit_are_refused(layout, shape):
    with pytest.raises(HoraError, match=r"\(spec L3\)"):
        layout.check(shape, SHAPE)


def test_l2_blocks_by_hand():
    """Two heads of width 2 stored as [head][q k v]: rows q0 q0 k0 k0 v0 v0 q1 q1 k1 k1 v1 v1."""
    fused, shape = np.arange(12)[:, None], ProjectionShape(2, 2, 1)
    for start, rows in ((0, [0, 1, 6, 7]), (2, [2, 3, 8, 9]), (4, [4, 5, 10, 11])):
        layout = Layout("(h k) d", Window(0, start, start + 2, blocks=2))
        layout.check(fused.shape, shape)
        assert layout.read(fused).ravel().tolist() == rows
        assert layout.rows(fused.shape).positions.tolist() == rows


def test_l1_groups_of_heads_are_numbered_group_by_group():
    """Two groups of three heads of width one, stored with heads outside and groups inside."""
    stored = np.arange(6).reshape(3, 2)[:, None, :, None]  # h d g k
    assert Layout("h d g k").read(stored).ravel().tolist() == [0, 2, 4, 1, 3, 5]


def test_l2_a_window_of_all_rows_is_one_slice_however_it_is_written():
    assert Window(0, 0, 3, blocks=4).span(12) == Window(0, 0, 12).span(12) == Span(0, 12, 1, 12)
    assert Window(0, 0, 3, blocks=4).span(12).index == slice(0, 12)
    assert str(Window(0, 1, 3, blocks=2).span(8)) == "1:3 of each 4 of 8"


@given(stored_layouts())
def test_l4_reading_is_undone_by_writing_and_leaves_the_rest(drawn):
    layout, shape, projection = drawn
    layout.check(shape, projection)
    numbers = np.arange(np.prod(shape)).reshape(shape)
    canonical = layout.read(numbers)
    assert canonical.shape[-2:] == projection.weight_shape
    assert len(np.unique(canonical)) == canonical.size
    copy = -np.ones_like(numbers)
    copy[layout.index(shape)] = layout.write(canonical, shape)
    np.testing.assert_array_equal(np.sort(copy[copy >= 0]), np.sort(canonical.ravel()))
    np.testing.assert_array_equal(layout.read(copy), canonical)


@given(stored_layouts())
def test_l2_rows_of_a_window_are_those_that_it_reads(drawn):
    layout, shape, _ = drawn
    whole = Layout(layout.pattern)
    row_of = np.arange(layout.rows(shape).size)[:, None]
    canonical = np.broadcast_to(row_of, (2,) * whole.stacked + (len(row_of), shape[layout.axes.index("d")]))
    numbers = whole.write(canonical, shape)
    rows, read = layout.rows(shape).positions[:, None], layout.read(numbers)
    np.testing.assert_array_equal(read, np.broadcast_to(rows, read.shape))


@given(stored_layouts())
def test_l4_the_reference_merges_into_the_entries_that_a_layout_reads(drawn):
    layout, shape, _ = drawn
    weight = np.zeros(shape, np.float32)
    delta = 1.0 + np.arange(layout.read(weight).size).reshape(layout.read(weight).shape)
    merged = merge(weight, delta, layout)
    np.testing.assert_array_equal(layout.read(merged), delta)
    assert np.count_nonzero(merged) == delta.size


@given(stored_layouts(), stored_layouts())
def test_f2_windows_overlap_where_they_share_an_entry(one, other):
    (layout, shape, _), window = one, other[0].window
    fits = window is not None and window.axis < len(shape) and shape[window.axis] % window.blocks == 0
    if not fits or window.stop > shape[window.axis] // window.blocks:
        return
    second = Layout(layout.pattern, window)
    seen = [np.zeros(shape, bool), np.zeros(shape, bool)]
    for part, mask in zip((layout, second), seen, strict=True):
        mask[part.index(shape)] = True
    assert layout.overlaps(second, shape) == bool((seen[0] & seen[1]).any())


@pytest.mark.parametrize("parts", [("q", "k"), ("q", "v")])
def test_f2_parts_of_each_head_do_not_overlap(parts):
    starts = {"q": 0, "k": 3, "v": 6}
    one, other = (Layout(window=Window(0, starts[p], starts[p] + 3, blocks=2)) for p in parts)
    assert not one.overlaps(other, (18, 4))
    assert one.overlaps(one, (18, 4))


def test_l1_axes_of_length_one_can_be_left_out():
    layout = Layout("1 l (h k) 1 d 1", Window(2, 0, 4))
    assert layout.squeezed == Layout("l (h k) d", Window(1, 0, 4))
    stored = np.arange(3 * 8 * 5).reshape(1, 3, 8, 1, 5, 1)
    np.testing.assert_array_equal(layout.squeezed.read(stored.squeeze()), layout.read(stored))
    assert Layout("(h k) d 1 1").squeezed == Layout()
