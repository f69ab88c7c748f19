"""Merged checkpoints with the names of the PyTorch model, from an adapter that was trained on a tree of JAX."""

import os
from collections.abc import Mapping
from typing import Any

import hora_spec
import jax
import numpy as np
from hora_spec import HoraError
from hora_spec.merged import Progress

from hora_jax.adapter import Phi, weights
from hora_jax.files import to_adapter
from hora_jax.planning import Layer, Plan
from hora_jax.processes import by_the_first, is_spread, on_host
from hora_jax.targets import Site

Path = str | os.PathLike[str]


def save_merged(
    directory: Path,
    plan: Plan,
    params: Any,
    phi: Phi,
    *,
    base: Path,
    modules: Phi | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write the checkpoint that the tree was loaded from with the adapter merged, for servers of PyTorch's names.

    Parameters
    ----------
    directory
        New or empty; it appears when all is written.
    plan, params, phi
        A plan, the tree of unmerged weights that the adapter was trained on, and the adapter.
    base
        Directory of the Hugging Face checkpoint with these weights, as safetensors in one file or several.
    modules
        Tensors of modules trained whole, by their path in the PyTorch model, in its orientation.
    progress
        Called with the bytes written so far and their total.

    Returns
    -------
    list of str
        Names of the tensors that were changed, in the first process.

    Raises
    ------
    HoraError
        If a planned weight of the tree is not the one of that name in `base`, to the last bit of the coarser dtype:
        it is another checkpoint, heads or their rows stand in another order, or the tree was merged or trained. And
        where `hora_spec.save_merged` refuses. Nothing has been written then.

    Notes
    -----
    Spec M4. Sums are made from the values in `base`, tensor by tensor; all else is copied. Rows are found by the plan's
    layouts and modules by its layer names, as in adapter files, and that they are the right ones is what comparing the
    weights shows. Of quantised weights there is nothing to compare: pass the tree that was quantised. Where the weights
    or phi are sharded over processes, all of them call this function, and the first one writes.
    """
    old = weights(plan, params)
    if codes := [path for path, leaf in old.items() if leaf.dtype.itemsize < 2]:
        raise HoraError(
            f"weights are compared with those of the checkpoint, got codes in {codes[0]} ({old[codes[0]].dtype}): pass "
            "the tree as it was before it was quantised (spec M1)"
        )
    held = {path: on_host(leaf) if is_spread(leaf) else leaf for path, leaf in old.items()}
    adapter, trained = to_adapter(plan, phi, modules=modules), _Trained(plan, held)

    def write() -> list[str]:
        return hora_spec.save_merged(adapter, base, directory, progress=progress, check=trained.compare)

    return by_the_first(write, [phi, old]) or []


class _Trained:
    """The weights of a tree, by their paths in the PyTorch model."""

    def __init__(self, plan: Plan, old: Mapping[str, jax.Array | np.ndarray]) -> None:
        self.old = old
        self.places: dict[str, list[tuple[Layer, Site, int]]] = {}
        for layer in plan.layers:
            for number, name in enumerate(layer.names):
                for site in layer.sites:
                    self.places.setdefault(f"{name}.{site.module}.weight", []).append((layer, site, number))

    def compare(self, path: str, stored: np.ndarray) -> None:
        """Raise unless the checkpoint's weight is the tree's, row by row."""
        for _, site, number in self.places[path]:
            expected = self._rows(site, number)
            got = stored[site.layout.rows(site.shape).positions].astype(expected.dtype)
            if not np.array_equal(got, expected):
                far = np.abs(got.astype(np.float64) - expected.astype(np.float64)).max()
                raise HoraError(
                    f"the adapter was trained on the weights of the checkpoint, got others in {path} than in "
                    f"{site.path}, by up to {far:.1e}: take the checkpoint that the tree was loaded from, and the tree "
                    "as it was loaded; if they are, the plan takes rows or heads in another order (spec M4)"
                )

    def _rows(self, site: Site, number: int) -> np.ndarray:
        """The projection of one layer in canonical form, (rows, embed)."""
        leaf = self.old[site.path]
        if not site.layout.stacked:
            return np.asarray(site.layout.read(leaf))
        axis = site.layout.axes.index("l")
        one = leaf[(*(slice(None),) * axis, slice(number, number + 1))]
        return np.asarray(site.layout.read(one))[0]
