"""Adapters on disk: the PEFT directory that every backend reads and writes (spec F1 to F6)."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import hora_spec
import jax
import jax.numpy as jnp
import numpy as np
from hora_spec import Adapter, AdapterLayer, AdapterSpec, HoraError, Layout, Window
from numpy.typing import DTypeLike

from hora_jax.adapter import Phi, check, stack
from hora_jax.planning import Layer, Plan, check_plan, make_plan
from hora_jax.processes import by_the_first, on_host
from hora_jax.targets import Site, Target

Path = str | os.PathLike[str]


def save_adapter(
    directory: Path, plan: Plan, phi: Phi, *, config: Mapping[str, Any] | None = None, modules: Phi | None = None
) -> None:
    """Write an adapter as a PEFT directory, atomically.

    Parameters
    ----------
    directory
        New, empty, or holding an earlier HoRA adapter.
    plan, phi
        A plan and its adapter.
    config
        Further keys of ``adapter_config.json``, such as ``base_model_name_or_path``.
    modules
        Tensors of modules trained whole, by their path in the PyTorch model, in its orientation.

    Raises
    ------
    HoraError
        If phi does not fit the plan or is not finite, or the directory holds something else. Nothing is written then.

    Notes
    -----
    Values of 16 bits are written as float32, which is exact. The first process writes. Where phi is sharded over
    processes, all of them call this function, as they do `export_lora`, and go on when the files are there.
    """
    adapter = to_adapter(plan, phi, config=config, modules=modules)
    by_the_first(lambda: hora_spec.save_adapter(directory, adapter), phi)


def load_adapter(directory: Path, plan: Plan, *, skip_modules: bool = False) -> dict[str, dict[str, jax.Array]]:
    """Read the adapter of a plan, whichever backend wrote it.

    Parameters
    ----------
    directory
        A PEFT directory of type HORA.
    plan
        Made with the method of the file: pass `hora_jax.load_specs` of the directory to `hora_jax.make_plan`.
    skip_modules
        Leave out modules that were trained whole. `hora_spec.load_adapter(directory).modules` has them, in PyTorch's
        names and orientation.

    Returns
    -------
    dict
        The adapter, as from `hora_jax.init`.

    Raises
    ------
    HoraError
        If the files are damaged, or describe other layers, methods or shapes than the plan.
    """
    return from_adapter(plan, hora_spec.load_adapter(directory), skip_modules=skip_modules)


def plan_from(directory: Path, params: Any, targets: Target | Sequence[Target]) -> Plan:
    """The plan of an adapter on disk for a tree: methods and layers are the file's, places are the targets'.

    Parameters
    ----------
    directory
        A PEFT directory of type HORA, whichever backend wrote it.
    params, targets
        As for `hora_jax.make_plan`. Layers of the tree that the file does not adapt are left out.

    Raises
    ------
    HoraError
        If a layer of the file is not in the tree, or has another shape there.
    """
    stored = hora_spec.load_adapter(directory).layers
    projections = {p for layer in stored.values() for p in layer.shape}
    chosen = [t for t in ((targets,) if isinstance(targets, Target) else targets) if t.projection in projections]
    found = make_plan(params, next(iter(stored.values())).spec, chosen)
    kept = [layer for layer in found.layers if any(name in stored for name in layer.names)]
    plan = Plan(tuple(replace(layer, spec=_one_spec(stored, layer)) for layer in kept))
    check_same_layers(plan, stored)
    return plan


def _one_spec(stored: Mapping[str, AdapterLayer], layer: Layer) -> AdapterSpec:
    missing = sorted(set(layer.names) - stored.keys())
    specs = {stored[name].spec for name in layer.names if name in stored}
    if missing or len(specs) > 1:
        raise HoraError(
            f"layers of a stack are adapted together and alike, got {layer.name} with {missing[:3]} missing there "
            f"and {len(specs)} methods: unstack the tree (spec F2)"
        )
    return specs.pop()


def load_specs(directory: Path) -> dict[str, AdapterSpec]:
    """Method of every layer of an adapter on disk, as `hora_jax.make_plan` takes it."""
    return {name: layer.spec for name, layer in hora_spec.load_adapter(directory).layers.items()}


def export_lora(
    plan: Plan,
    phi: Phi,
    directory: Path,
    *,
    config: Mapping[str, Any] | None = None,
    modules: Phi | None = None,
    dtype: DTypeLike = np.float32,
    compact: bool = False,
    for_server: str | None = None,
) -> None:
    """Write an adapter as a standard LoRA adapter that computes the same, exactly and without an SVD (spec F6).

    Parameters
    ----------
    plan, phi
        A plan and its adapter.
    directory
        New, empty, or left by an export that was interrupted.
    config, modules
        As for `save_adapter`.
    dtype, compact, for_server
        As for `hora_spec.export_lora`: dtype of the tensors, whether modules keep ranks and alphas of their own, and
        the server whose limits are checked.

    Raises
    ------
    HoraError
        If phi does not fit the plan, the directory is not empty, or the server takes no such adapter. Nothing is
        written then.
    """
    adapter = to_adapter(plan, phi, config=config, modules=modules)

    def write() -> None:
        hora_spec.export_lora(adapter, directory, dtype=dtype, compact=compact, for_server=for_server)

    by_the_first(write, phi)


def to_adapter(plan: Plan, phi: Phi, *, config: Mapping[str, Any] | None = None, modules: Phi | None = None) -> Adapter:
    """The adapter in the form of `hora_spec`: one entry for each layer, NumPy arrays, places in the PyTorch model."""
    check(plan, phi)
    for name, given in {"config": config, "modules": modules}.items():
        if not isinstance(given, Mapping | None):
            raise HoraError(f"{name} is a mapping by name, got {given!r:.60}: leave it out, or pass a dict (spec F2)")
    layers = {}
    for key, members in plan.groups().items():
        params = {name: _in_float32(on_host(value)) for name, value in phi[key].items()}
        rows = ((layer, name) for layer in members for name in layer.names)
        for i, (layer, name) in enumerate(rows):
            sites = {site.projection: _file_site(layer, site, name) for site in layer.sites}
            layers[name] = AdapterLayer(layer.spec, sites, {key: value[i] for key, value in params.items()})
    ordered = {name: layers[name] for layer in plan.layers for name in layer.names}
    return Adapter(ordered, dict(config or {}), {key: np.asarray(value) for key, value in (modules or {}).items()})


def _in_float32(value: np.ndarray) -> np.ndarray:
    """Files have no narrower floating types; of those this is exact."""
    return value.astype(np.float32) if value.dtype.itemsize < 4 else value


def from_adapter(plan: Plan, adapter: Adapter, *, skip_modules: bool = False) -> dict[str, dict[str, jax.Array]]:
    """The parameters of an adapter, stacked as the plan says."""
    if not isinstance(adapter, Adapter):
        raise HoraError(f"an adapter is what hora_spec.load_adapter returns, got {adapter!r:.60}: pass that (spec F2)")
    check_same_layers(plan, adapter.layers)
    if adapter.modules and not skip_modules:
        raise HoraError(
            f"modules trained whole are not part of phi, got {sorted(adapter.modules)[:3]}: put them into the tree "
            "from hora_spec.load_adapter(directory).modules and pass skip_modules=True (spec F2)"
        )
    return {
        key: stack([dict(adapter.layers[name].params) for layer in members for name in layer.names], jnp.float32)
        for key, members in plan.groups().items()
    }


def check_same_layers(plan: Plan, stored: Mapping[str, AdapterLayer]) -> None:
    """Raise unless an adapter has the layers, methods and shapes of the plan (spec F2)."""
    names = [name for layer in check_plan(plan).layers for name in layer.names]
    if set(names) != stored.keys():
        missing, extra = sorted(set(names) - stored.keys()), sorted(stored.keys() - set(names))
        raise HoraError(
            f"an adapter has the layers of the plan, missing {missing[:3]}, extra {extra[:3]}: the adapter is of "
            "another model, or the targets name its layers differently (spec F2)"
        )
    for layer in plan.layers:
        for name in layer.names:
            got = stored[name]
            if (got.spec, got.shape) != (layer.spec, layer.shape):
                raise HoraError(
                    f"layer {name!r} of the plan has {layer.spec} and {layer.shape}, got {got.spec} and {got.shape} in "
                    "the adapter: plan with spec=hora_jax.load_specs(directory) and its projections (spec F2)"
                )


def _file_site(layer: Layer, site: Site, name: str) -> hora_spec.Site:
    """Place of a projection in the PyTorch model: rows of a Linear weight, the same rows as in the tree."""
    projection, rows = layer.shape[site.projection], site.layout.rows(site.shape)
    whole = len(rows) == rows.size
    layout = Layout(window=None if whole else Window(0, rows.start, rows.stop, rows.blocks))
    return hora_spec.Site(f"{name}.{site.module}", "weight", (rows.size, projection.embed_dim), layout, projection)
