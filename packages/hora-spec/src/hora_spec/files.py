"""Adapters on disk: PEFT adapter directories that explain themselves (spec F1 to F7)."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hora_spec.adapter import Adapter, AdapterLayer, Site, check_adapter
from hora_spec.directory import read_pair, write_pair
from hora_spec.errors import HoraError
from hora_spec.layout import Layout, Window
from hora_spec.shapes import ProjectionShape, param_shapes
from hora_spec.spec import LATER_FIELDS, AdapterSpec
from hora_spec.tensors import Stored, decode, encode, tensors_digest, to_numpy

SPEC_VERSION = 1
"""Version of the specification, written as ``hora_spec_version``."""

PEFT_TYPE = "HORA"
PREFIX = "base_model.model."
"""What PEFT puts before every path in the base model."""

LAYERS_DIGEST, TENSORS_DIGEST = "hora_layers_sha256", "hora_tensors_sha256"
_REQUIRED = ("peft_type", "hora_spec_version", "hora_layers")
RESERVED = (*_REQUIRED, LAYERS_DIGEST, TENSORS_DIGEST)
"""Keys of the config that follow from the adapter."""


def load_adapter(directory: str | os.PathLike[str]) -> Adapter:
    """Read an adapter that either backend, or `save_adapter`, has written.

    Parameters
    ----------
    directory
        A PEFT adapter directory of type HORA.

    Returns
    -------
    Adapter
        Fully validated; parameters in canonical order.

    Raises
    ------
    HoraError
        If anything is absent, damaged, of another version, or does not fit (spec F1, F2, F4, F5, F7).
    """
    return adapter_of(*read_pair(Path(directory)))


def adapter_of(config: Mapping[str, Any], stored: Sequence[Stored], *, any_float: bool = False) -> Adapter:
    """The adapter that a config and tensors describe, fully validated (spec F1, F2, F4, F5, F7).

    Parameters
    ----------
    config, stored
        As `hora_spec.directory.read_pair` returns them.
    any_float
        Take parameters of any floating dtype, rounded to float32, as frameworks do that cast what they load.

    Raises
    ------
    HoraError
        As `load_adapter`.
    """
    _check_version(config)
    check_digests(config, stored)
    tensors = {tensor.name: to_numpy(tensor) for tensor in stored}
    if any_float:
        tensors = {
            name: a.astype(np.float32) if ".hora_hyper." in name and a.dtype.kind == "f" else a
            for name, a in tensors.items()
        }
    entries = config["hora_layers"]
    if not isinstance(entries, list):
        raise HoraError(f"hora_layers must be a list of layers, got {type(entries).__name__} (spec F2)")
    layers: dict[str, AdapterLayer] = {}
    for name, spec, sites in map(layer_from_json, entries):
        if name in layers:
            raise HoraError(f"layer names are unique, got {name!r} twice (spec F2)")
        layers[name] = _take_params(AdapterLayer(spec, sites, {}), tensors)
    if strangers := [key for key in tensors if not key.startswith(PREFIX) or ".hora_hyper." in key]:
        raise HoraError(
            f"every tensor belongs to a layer or to a module trained whole, got also {strangers[:3]}: config and "
            "tensors are of different adapters (spec F5)"
        )
    modules = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
    adapter = Adapter(layers, {key: value for key, value in config.items() if key not in RESERVED}, modules)
    check_adapter(adapter)
    return adapter


def save_adapter(directory: str | os.PathLike[str], adapter: Adapter) -> None:
    """Write an adapter as a PEFT adapter directory, atomically; equal tensors give equal bytes.

    Parameters
    ----------
    directory
        New, empty, or holding an earlier HoRA adapter, which is replaced; other files in it stay.
    adapter
        The adapter. Keys that PEFT needs and ``adapter.config`` lacks follow from the layers.

    Raises
    ------
    HoraError
        If the adapter does not fit its own description, or the directory holds something else (spec F2, F3, F5).
        Nothing has been written then.
    """
    check_adapter(adapter)
    tensors = {PREFIX + name: value for name, value in adapter.modules.items()}
    for layer in adapter.layers.values():
        tensors |= {_prefix(layer) + name: value for name, value in layer.params.items()}
    data = encode(tensors)
    layers = [layer_to_json(name, layer.spec, layer.sites) for name, layer in adapter.layers.items()]
    config = {
        **peft_keys(adapter.layers),
        **adapter.config,
        "peft_type": PEFT_TYPE,
        "hora_spec_version": SPEC_VERSION,
        "hora_layers": layers,
        LAYERS_DIGEST: layers_digest(layers),
        TENSORS_DIGEST: tensors_digest(decode(data, Path(directory))),
    }
    write_pair(Path(directory), config, data, replace=True)


def layers_digest(layers: Any) -> str:
    """SHA-256 of ``hora_layers``, keys sorted and without white space (spec F7)."""
    try:
        return hashlib.sha256(json.dumps(layers, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    except (TypeError, ValueError, RecursionError) as error:
        raise HoraError(f"hora_layers consists of JSON values: {error} (spec F2)") from error


def check_digests(config: Mapping[str, Any], tensors: Iterable[Stored]) -> None:
    """Raise unless the digests in a config, where it has any, are those of its layers and tensors (spec F7)."""
    if config.get(LAYERS_DIGEST) not in (None, layers_digest(config.get("hora_layers"))):
        raise HoraError(
            f"{LAYERS_DIGEST} is the digest of hora_layers, got that of another table: the config is damaged or was "
            f"edited; save the adapter again, or remove {LAYERS_DIGEST} if the change was meant (spec F7)"
        )
    if config.get(TENSORS_DIGEST) not in (None, tensors_digest(tensors)):
        raise torn_pair()


def torn_pair() -> HoraError:
    """The error for tensors that are not those the config was written with."""
    return HoraError(
        f"{TENSORS_DIGEST} is the digest of the tensors, got that of others: a save was interrupted or is under way, a "
        f"file is damaged, or config and tensors are of different adapters; save the adapter again, or remove "
        f"{TENSORS_DIGEST} from the config if the change was meant (spec F7)"
    )


def layer_to_json(name: str, spec: AdapterSpec, sites: Mapping[str, Site]) -> dict[str, Any]:
    """One entry of ``hora_layers`` (spec F2); `sites` in model order, the module of the first one leads."""
    return {
        "name": name,
        "spec": spec.to_dict(),
        "leader": next(iter(sites.values())).module,
        "projections": {p: _site_to_json(site) for p, site in sorted(sites.items())},
    }


def layer_from_json(entry: Any) -> tuple[str, AdapterSpec, dict[str, Site]]:
    """Inverse of `layer_to_json`: name, spec and sites, the leader's first (spec F2, F4)."""
    name, spec, leader, projections = _values(entry, ("name", "spec", "leader", "projections"), "a layer")
    _values(spec, tuple(AdapterSpec().to_dict()), "the spec of a layer", optional=LATER_FIELDS)
    if not isinstance(name, str) or not isinstance(projections, dict):
        raise HoraError(f"a layer has a name and maps projections to places, got {name!r}, {projections!r} (spec F2)")
    sites = {p: _site_from_json(site) for p, site in projections.items()}
    if leader not in [site.module for site in sites.values()]:
        raise HoraError(f"the leader of a layer is one of its modules, got {leader!r} for {name!r} (spec F2)")
    sites = dict(sorted(sites.items(), key=lambda item: (item[1].module != leader, item[0])))
    return name, AdapterSpec.from_dict(spec), sites


def pattern(module: str) -> str:
    """Key of PEFT's ``rank_pattern`` and ``alpha_pattern`` that matches one module alone."""
    return "^" + re.escape(module)


def _site_to_json(site: Site) -> dict[str, Any]:
    window = site.layout.window
    return {
        "module": site.module,
        "parameter": site.parameter,
        **dataclasses.asdict(site.projection),
        "weight_shape": list(site.weight_shape),
        "layout": {
            "pattern": site.layout.pattern,
            "window": None if window is None else _window_to_json(window),
        },
    }


def _window_to_json(window: Window) -> list[int]:
    """Without blocks where there is one, as readers of the first adapters expect."""
    blocks = [window.blocks] if window.blocks > 1 else []
    return [window.axis, window.start, window.stop, *blocks]


def _site_from_json(entry: Any) -> Site:
    keys = ("module", "parameter", "num_heads", "head_dim", "embed_dim", "weight_shape", "layout")
    module, parameter, num_heads, head_dim, embed_dim, shape, layout = _values(entry, keys, "a projection")
    text, window = _values(layout, ("pattern", "window"), "a layout")
    if not isinstance(text, str):
        raise HoraError(f"a pattern is a string, got {text!r} (spec F2)")
    if window is not None:
        window = Window(*_integers(window, "a window", 3, 4))
    return Site(
        module,
        parameter,
        tuple(_integers(shape, "a weight shape")),
        Layout(text, window),
        ProjectionShape(num_heads, head_dim, embed_dim),
    )


def _values(entry: Any, keys: tuple[str, ...], what: str, *, optional: Collection[str] = ()) -> list[Any]:
    """Values of a JSON object that has exactly `keys`, and perhaps some of the `optional` ones."""
    if not isinstance(entry, dict):
        raise HoraError(f"{what} is described by a JSON object, got {entry!r} (spec F2)")
    if entry.keys() - set(optional) != set(keys):
        missing, unknown = sorted(set(keys) - entry.keys()), sorted(entry.keys() - set(keys) - set(optional))
        raise HoraError(
            f"{what} has the fields {list(keys)}, missing {missing}, unknown {unknown}: written by a newer version, or "
            "damaged (spec F4)"
        )
    return [entry[key] for key in keys]


def _integers(values: Any, what: str, *counts: int) -> list[int]:
    whole = isinstance(values, list) and all(type(value) is int for value in values)
    if not whole or len(values) not in (counts or (len(values),)):
        raise HoraError(f"{what} is a list of {' or '.join(map(str, counts))} integers, got {values!r} (spec F2)")
    return values


def _check_version(config: Mapping[str, Any]) -> None:
    if (got := config.get("peft_type")) != PEFT_TYPE:
        raise HoraError(f"a HoRA adapter has peft_type {PEFT_TYPE!r}, got {got!r}: it is another method's (spec F1)")
    if missing := [key for key in _REQUIRED if config.get(key) is None]:
        raise HoraError(f"the config of an adapter holds {missing}, which are absent: save it again (spec F2)")
    if (version := config["hora_spec_version"]) != SPEC_VERSION or type(version) is not int:
        raise HoraError(
            f"this version reads adapters of spec version {SPEC_VERSION}, got {version!r}: upgrade hora-spec (spec F4)"
        )


def _take_params(layer: AdapterLayer, tensors: dict[str, Any]) -> AdapterLayer:
    """The layer with its parameters, in canonical order, which leave `tensors`."""
    prefix = _prefix(layer)
    params = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
    order = [*param_shapes(layer.spec, layer.shape), *params]  # strangers last; the check names them
    return dataclasses.replace(layer, params=dict(sorted(params.items(), key=lambda item: order.index(item[0]))))


def _prefix(layer: AdapterLayer) -> str:
    return f"{PREFIX}{layer.leader}.hora_hyper."


def peft_keys(layers: Mapping[str, AdapterLayer]) -> dict[str, Any]:
    """What PEFT's config of the method holds, as far as it follows from the layers."""
    first = next(iter(layers.values())).spec
    fields = first.to_dict()
    rank, alpha = fields.pop("rank"), fields.pop("alpha")
    ranks, alphas = {}, {}
    for layer in layers.values():
        for module in layer.modules:
            if layer.spec.rank != rank:
                ranks[pattern(module)] = layer.spec.rank
            if layer.spec.alpha != alpha:
                alphas[pattern(module)] = layer.spec.scaling * layer.spec.rank
    return {
        "r": rank,
        "hora_alpha": alpha,
        **fields,
        "target_modules": [module for layer in layers.values() for module in layer.modules],
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "inference_mode": True,
    }
