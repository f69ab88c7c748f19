"""Goldens of stored weights: how models lay out their projections, and what merging makes of them (spec L1 to L4).

Weights are put together from their projections as each model's own code takes them apart, without `Layout`: what the
layouts read is compared with something that does not know them.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from hora_spec.errors import HoraError
from hora_spec.goldens import stored_files
from hora_spec.layout import Layout, Window
from hora_spec.shapes import ProjectionShape

Array = NDArray[Any]
FOLDER = "stored_v1"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StoredGolden:
    """One stored weight; mappings go from projection to array or description.

    Parameters
    ----------
    name
        The order of its rows.
    layouts, shapes
        Where each adapted projection sits, and its heads.
    weight, merged
        The whole stored weight, float32, before and after every delta was added and rounded once.
    parts
        Canonical weights (heads * head_dim, embed), layers first where the weight stacks them.
    deltas
        Float32, of the shape of the parts.
    """

    name: str
    layouts: dict[str, Layout]
    shapes: dict[str, ProjectionShape]
    weight: Array
    merged: Array
    parts: dict[str, Array]
    deltas: dict[str, Array]

    def __repr__(self) -> str:
        return f"load_stored_goldens()[{self.name!r}]"


def load_stored_goldens() -> dict[str, StoredGolden]:
    """Stored weights by name.

    Raises
    ------
    HoraError
        If there are none: a test over them would prove nothing.

    Examples
    --------
    >>> golden = load_stored_goldens()["gpt_neox"]
    >>> golden.layouts["v"].window
    Window(axis=0, start=4, stop=6, blocks=3)
    """
    goldens = [_parse(name, data) for name, data in stored_files(FOLDER)]
    if not goldens:
        raise HoraError(f"goldens of stored weights lie in {FOLDER}, got none: reinstall")
    return {golden.name: golden for golden in goldens}


def serialized(golden: StoredGolden) -> bytes:
    """Content of the golden's file; equal goldens have equal bytes."""
    about = {
        p: {
            "pattern": layout.pattern,
            "window": None if (w := layout.window) is None else [w.axis, w.start, w.stop, w.blocks],
            "shape": [golden.shapes[p].num_heads, golden.shapes[p].head_dim, golden.shapes[p].embed_dim],
        }
        for p, layout in golden.layouts.items()
    }
    tensors = {"weight": golden.weight, "merged": golden.merged}
    tensors |= {f"part.{p}": part for p, part in golden.parts.items()}
    tensors |= {f"delta.{p}": delta for p, delta in golden.deltas.items()}
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    return save(tensors, metadata={"stored": json.dumps(about)})


def _parse(file: str, data: bytes) -> StoredGolden:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about, tensors = json.loads(header["__metadata__"]["stored"]), load(data)
    windows = {p: values["window"] for p, values in about.items()}
    return StoredGolden(
        name=file.removesuffix(".safetensors"),
        layouts={p: Layout(v["pattern"], Window(*windows[p]) if windows[p] else None) for p, v in about.items()},
        shapes={p: ProjectionShape(*values["shape"]) for p, values in about.items()},
        weight=tensors["weight"],
        merged=tensors["merged"],
        parts={p: tensors[f"part.{p}"] for p in about},
        deltas={p: tensors[f"delta.{p}"] for p in about},
    )
