"""Making goldens of stored weights: each put together as the code of a model takes it apart."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hora_spec.errors import HoraError
from hora_spec.goldens.stored import StoredGolden, serialized
from hora_spec.init import normal, raw_stream
from hora_spec.layout import Layout, Window
from hora_spec.shapes import ProjectionShape

Array = NDArray[Any]
Parts = Mapping[str, Array]
EMBED = 5


class _Order(NamedTuple):
    """A way to store projections: heads x width of each, how to put them together, and layouts of the adapted ones.

    `shapes` also hold what the weight stores beside the adapted projections.
    """

    shapes: Mapping[str, tuple[int, int]]
    store: Callable[[Parts], Array]
    layouts: Mapping[str, Layout]
    layers: int | None = None


def _rows(*parts: str) -> Callable[[Parts], Array]:
    """All rows of one projection after those of another."""
    return lambda weights: np.concatenate([weights[p] for p in parts])


def _by_block(blocks: int, *parts: str) -> Callable[[Parts], Array]:
    """Equally many rows of every projection, then the next ones of each."""
    return lambda weights: np.concatenate(
        [block for group in zip(*(np.split(weights[p], blocks) for p in parts), strict=True) for block in group]
    )


def _transposed(store: Callable[[Parts], Array]) -> Callable[[Parts], Array]:
    return lambda weights: store(weights).T


def _windows(blocks: int, pattern: str = "(h k) d", **ranges: tuple[int, int]) -> dict[str, Layout]:
    axis = pattern.split(" ").index("d") == 0
    return {p: Layout(pattern, Window(int(axis), start, stop, blocks)) for p, (start, stop) in ranges.items()}


def _heads(name: str, groups: int) -> Callable[[Parts], Array]:
    """An axis of groups, one of heads in a group, one of rows, behind the embed axis."""

    def store(weights: Parts) -> Array:
        rows = np.stack([np.stack(np.split(part, 2)) for part in np.split(weights[name], groups)])
        return np.moveaxis(rows, -1, 0)

    return store


def _kernel(heads: int, *parts: str) -> Callable[[Parts], Array]:
    """Flax: embed, heads, and behind each other the rows that each projection has in a head."""
    return lambda weights: np.stack(
        [np.concatenate([np.split(weights[p], heads)[i] for p in parts]).T for i in range(heads)], axis=1
    )


def _scanned(store: Callable[[Parts], Array]) -> Callable[[Parts], Array]:
    """A second axis of layers."""
    return lambda weights: np.stack([store({p: w[i] for p, w in weights.items()}) for i in range(2)], axis=1)


ORDERS: Mapping[str, _Order] = {
    "gpt_neox": _Order(
        {"q": (3, 2), "k": (3, 2), "v": (3, 2)}, _by_block(3, "q", "k", "v"), _windows(3, q=(0, 2), v=(4, 6))
    ),
    "conv1d_by_head": _Order(
        {"q": (2, 3), "k": (2, 3), "v": (2, 3)},
        _transposed(_by_block(2, "q", "k", "v")),
        _windows(2, "d (h k)", q=(0, 3), k=(3, 6), v=(6, 9)),
    ),
    "falcon_40b": _Order(
        {"q": (6, 2), "k": (2, 2), "v": (2, 2)}, _by_block(2, "q", "k", "v"), _windows(2, q=(0, 6), k=(6, 8), v=(8, 10))
    ),
    "falcon_7b": _Order(
        {"q": (4, 2), "k": (1, 2), "v": (1, 2)}, _rows("q", "k", "v"), _windows(1, q=(0, 8), v=(10, 12))
    ),
    "codegen": _Order(
        {"q": (8, 1), "v": (8, 1), "k": (8, 1)}, _by_block(4, "q", "v", "k"), _windows(4, q=(0, 2), v=(2, 4), k=(4, 6))
    ),
    "unequal_widths": _Order(
        {"q": (3, 2), "k": (3, 2), "v": (3, 4)}, _by_block(3, "q", "k", "v"), _windows(3, q=(0, 2), v=(4, 8))
    ),
    "latent_kv": _Order({"k": (3, 4), "v": (3, 2)}, _by_block(3, "k", "v"), _windows(3, v=(4, 6))),
    "gated_query": _Order({"q": (3, 2), "gate": (3, 2)}, _by_block(3, "q", "gate"), _windows(3, q=(0, 2))),
    "gated_delta_net": _Order(
        {"q": (2, 3), "k": (2, 3), "v": (4, 2), "z": (4, 2)},
        _by_block(2, "q", "k", "v", "z"),
        _windows(2, q=(0, 3), k=(3, 6), v=(6, 10)),
    ),
    "mamba_2": _Order(
        {"z": (4, 2), "x": (4, 2), "b": (2, 3), "c": (2, 3), "dt": (4, 1)},
        _rows("z", "x", "b", "c", "dt"),
        _windows(1, x=(8, 16), b=(16, 22), c=(22, 28)),
    ),
    "latent_kv_kernel": _Order(
        {"k": (3, 4), "v": (3, 2)}, _kernel(3, "k", "v"), {"v": Layout("d h k", Window(2, 4, 6))}
    ),
    "grouped_kernel": _Order({"q": (6, 2)}, _heads("q", 3), {"q": Layout("d g h k")}),
    "grouped_kernel_scanned": _Order({"q": (6, 2)}, _scanned(_heads("q", 3)), {"q": Layout("d l g h k")}, 2),
}
"""Orders of rows, by the model that is known for each."""


def built_stored() -> dict[str, StoredGolden]:
    """All goldens of stored weights, made anew."""
    return {name: _build(name, order) for name, order in ORDERS.items()}


def write_stored(folder: Path, goldens: Iterable[StoredGolden]) -> None:
    """Store goldens in a new folder; stored ones are never edited."""
    if folder.exists():
        raise HoraError(f"goldens are written to a new folder, got {folder}, which exists: add a version instead")
    folder.mkdir(parents=True)
    for golden in goldens:
        (folder / f"{golden.name}.safetensors").write_bytes(serialized(golden))


def _build(name: str, order: _Order) -> StoredGolden:
    shapes = {p: ProjectionShape(heads, width, EMBED) for p, (heads, width) in order.shapes.items()}
    weights = {p: _draw(f"{name}.weight.{p}", shape, order.layers) for p, shape in shapes.items()}
    deltas = {p: _draw(f"{name}.delta.{p}", shapes[p], order.layers) / np.float32(8) for p in order.layouts}
    sums = {p: (np.float64(w) + deltas.get(p, np.zeros(()))).astype(np.float32) for p, w in weights.items()}
    return StoredGolden(
        name=name,
        layouts=dict(order.layouts),
        shapes={p: shapes[p] for p in order.layouts},
        weight=order.store(weights),
        merged=order.store(sums),
        parts={p: weights[p] for p in order.layouts},
        deltas=deltas,
    )


def _draw(key: str, shape: ProjectionShape, layers: int | None) -> Array:
    size = (*([layers] if layers else []), *shape.weight_shape)
    return normal(raw_stream(0, "hora_spec.goldens.stored", key, int(np.prod(size)))).reshape(size).astype(np.float32)
