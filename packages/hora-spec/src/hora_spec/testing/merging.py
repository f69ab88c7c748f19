"""Checks of merging: every stored form, one rounding, and what must be refused."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hora_spec.errors import HoraError
from hora_spec.goldens.stored import StoredGolden
from hora_spec.layout import Layout, Window
from hora_spec.shapes import LayerShape, ProjectionShape
from hora_spec.spec import AdapterSpec
from hora_spec.testing.backend import REFERENCE, Backend
from hora_spec.testing.case import Case, numpy_dtype
from hora_spec.testing.claim import Claim

Array = NDArray[Any]


def stored_forms(shape: ProjectionShape) -> tuple[tuple[Layout, tuple[int, ...]], ...]:
    """Every form in which models store a projection, with the shape of the stored weight; two layers where stacked."""
    h, k, d = shape.num_heads, shape.head_dim, shape.embed_dim
    rows = h * k
    return (
        (Layout("(h k) d"), (rows, d)),  # torch Linear
        (Layout("d (h k)"), (d, rows)),  # Conv1D, Flax Dense
        (Layout("d h k"), (d, h, k)),  # Flax attention
        (Layout("h d k"), (h, d, k)),  # gemma
        (Layout("(h k) d", Window(0, rows, 2 * rows)), (3 * rows, d)),  # fused qkv rows
        (Layout("d (h k)", Window(1, 1, 1 + rows)), (d, rows + 4)),  # fused columns
        (Layout("1 h d k", Window(0, 1, 2)), (2, h, d, k)),  # one of several kernels along an axis
        (Layout("(h k) d", Window(0, 2 * k, 3 * k, blocks=h)), (3 * rows, d)),  # [head][q k v]
        (Layout("d (h k)", Window(1, k + 1, 2 * k + 1, blocks=h)), (d, h * (2 * k + 1))),  # ... of unequal widths
        (Layout("d h k", Window(2, 2, 2 + k)), (d, h, k + 3)),  # latent attention: [head][k_nope v]
        (Layout("h d k", Window(0, 0, 1, blocks=h)), (2 * h, d, k)),  # [head][q k] along an axis of heads
        (Layout("d g h k"), (d, 1, h, k)),  # heads in one group
        (Layout("d g h k"), (d, h, 1, k)),  # penzai: a head in each group
        (Layout("h g d k", Window(0, 1, 1 + h // _groups(h))), (2 + h // _groups(h), _groups(h), d, k)),
        (Layout("g (h k) d", Window(1, k, k + rows // _groups(h))), (_groups(h), k + rows // _groups(h), d)),
        (Layout("l d g h k", Window(4, 0, k)), (2, d, _groups(h), h // _groups(h), k + 1)),
        (Layout("l (h k) d"), (2, rows, d)),
        (Layout("l d h k"), (2, d, h, k)),
        (Layout("d (h k) l"), (d, rows, 2)),
        (Layout("l d (h k)", Window(2, rows, 2 * rows)), (2, d, 3 * rows)),  # stacked and fused
    )


def _groups(heads: int) -> int:
    """The smallest number of groups of several heads each; one if there is none."""
    return next((groups for groups in range(2, heads) if heads % groups == 0), 1)


def check_merge(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """Merged weights of `dtype` in every stored form, exact: summed in float32 or better, rounded once (spec M1, L4).

    A sum in float32 and one in float64 are both right for weights of at most 32 bits. Everything outside the window,
    and the weight that was given, stay as they were.
    """
    for p, shape in case.layer.items():
        for layout, stored_shape in stored_forms(shape):
            claim = Claim("check_merge", backend, case, dtype, "M1, L4", f"merge(weight, delta, {layout!r})")
            weight, delta = _given(case, p, layout, stored_shape, dtype)
            given = weight.copy()
            got = np.asarray(backend.merge(weight, delta, layout))
            claim.equal("the given weight after merging", weight, given)
            expected = REFERENCE.merge(weight, delta, layout)
            if dtype != "float64" and got.shape == expected.shape:
                other = REFERENCE.merge(weight.astype(np.float32), delta, layout).astype(weight.dtype)
                expected = np.where(got == other, other, expected)
            claim.equal(f"merged {p!r}", got, expected)
    return 0.0


def check_stored(backend: Backend, golden: StoredGolden, dtype: str = "float32") -> float:
    """Every delta of a stored golden merged in turn gives its merged weight, to the bit (spec L1 to L4, M1).

    Also that its layouts read and write what the weight was put together from.
    """
    case = Case(AdapterSpec(), LayerShape(golden.shapes))
    merged = golden.weight
    for p, layout in golden.layouts.items():
        claim = Claim("check_stored", backend, case, dtype, "L1, L2, L4", f"{golden!r}: {layout!r}")
        layout.check(golden.weight.shape, golden.shapes[p])
        claim.equal(f"{p!r} as read", layout.read(golden.weight), golden.parts[p])
        written = golden.weight.copy()
        written[layout.index(written.shape)] = layout.write(golden.parts[p], written.shape)
        claim.equal(f"{p!r} as written", written, golden.weight)
        merged = np.asarray(backend.merge(merged, golden.deltas[p], layout))
    claim = Claim("check_stored", backend, case, dtype, "L1, L2, L4", f"{golden!r}: merge")
    claim.equal("the merged weight", merged, golden.merged)
    return 0.0


def check_merge_refuses(backend: Backend, case: Case, dtype: str = "float32") -> float:
    """A delta that is not finite and a sum that overflows are a HoraError, and the weight stays (spec M3, E1, E2)."""
    layout = Layout()
    for p, shape in case.layer.items():
        weight, delta = _given(case, p, layout, shape.weight_shape, dtype)
        largest = 3e38 if dtype == "bfloat16" else float(np.finfo(weight.dtype).max)
        for what, value in (("NaN", np.nan), ("infinity", np.inf), ("overflow", largest)):
            bad_delta, bad_weight = delta.copy(), weight.copy()
            bad_delta[0, 0] = value
            bad_weight[0, 0] = abs(value) if what == "overflow" else bad_weight[0, 0]
            given = bad_weight.copy()
            claim = Claim(
                "check_merge_refuses", backend, case, dtype, "M3, E1, E2", f"merge(weight, delta with {what})"
            )
            try:
                got = backend.merge(bad_weight, bad_delta, layout)
            except HoraError:
                claim.equal("the weight after a refusal", bad_weight, given)
                continue
            raise claim.failure(f"merging {what} must raise HoraError, got {got[0, 0]}")
    return 0.0


def _given(case: Case, p: str, layout: Layout, stored_shape: tuple[int, ...], dtype: str) -> tuple[Array, Array]:
    """A stored weight of `dtype`, and a delta of float32, or float64 for a float64 weight."""
    shape = case.layer[p].weight_shape
    weight = case.draw(f"stored.{p}", stored_shape).astype(numpy_dtype(dtype))
    delta = case.draw(f"merge.{p}", (2, *shape) if layout.stacked else shape) / np.float32(8)
    return weight, delta.astype(np.float64) / 3 if dtype == "float64" else delta / np.float32(3)
