"""A trained adapter in memory: layers, the places of their projections in a model, and their parameters (spec F2)."""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hora_spec.errors import HoraError
from hora_spec.layout import Layout
from hora_spec.shapes import LayerShape, ProjectionShape, check_params, positive_int
from hora_spec.spec import AdapterSpec

_NAME = r"[^\s./\\\x00-\x1f\ud800-\udfff]+"  # lone surrogates cannot be written
_PATH = re.compile(rf"{_NAME}(\.{_NAME})*")
_PARAMETER = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Site:
    """Where one projection sits in a model.

    Parameters
    ----------
    module
        Dotted path of the module that owns the weight, in the base model.
    parameter
        Name of the weight in its module: ``weight``, ``in_proj_weight``.
    weight_shape
        Shape of the whole stored weight.
    layout
        How the stored weight holds the projection.
    projection
        Heads and widths.

    Raises
    ------
    HoraError
        If a name is not a dotted path, or the weight cannot hold the projection (spec F2, L3).
    """

    module: str
    parameter: str
    weight_shape: tuple[int, ...]
    layout: Layout
    projection: ProjectionShape

    def __post_init__(self) -> None:
        check_path("a module", self.module)
        if not isinstance(self.parameter, str) or not _PARAMETER.fullmatch(self.parameter):
            raise HoraError(
                f"a parameter is named by letters, digits and underscores, a letter first, got {self.parameter!r}: was "
                "the file edited? (spec F2)"
            )
        shape = tuple(positive_int("an axis of weight_shape", size) for size in self.weight_shape)
        object.__setattr__(self, "weight_shape", shape)
        self.layout.check(shape, self.projection)


@dataclass(frozen=True, slots=True, eq=False)
class AdapterLayer:
    """One layer of an adapter.

    Parameters
    ----------
    spec
        The layer's method; its rank may differ from that of other layers.
    sites
        Projection to place, **in model order**: the module of the first site leads, which means that the layer's
        tensors are stored under its name.
    params
        Canonical name to float32 array, as in `param_shapes`.
    """

    spec: AdapterSpec
    sites: Mapping[str, Site]
    params: Mapping[str, NDArray[np.float32]]

    @property
    def shape(self) -> LayerShape:
        """Shapes of the projections."""
        return LayerShape({name: site.projection for name, site in self.sites.items()})

    @property
    def leader(self) -> str:
        """Path of the layer's first target module."""
        return next(iter(self.sites.values())).module

    @property
    def modules(self) -> list[str]:
        """Paths of the adapted modules, in model order."""
        return list(dict.fromkeys(site.module for site in self.sites.values()))


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """The HoRA parameters of a model, with all it takes to understand them.

    Parameters
    ----------
    layers
        Layer name to layer, in model order.
    config
        The other keys of ``adapter_config.json``: what PEFT keeps beside the method, kept as it is.
    modules
        Tensor name to array, for modules that were trained whole (PEFT's ``modules_to_save``); a name is the tensor's
        path in the base model.
    """

    layers: Mapping[str, AdapterLayer]
    config: Mapping[str, Any] = field(default_factory=dict)
    modules: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def check_adapter(adapter: Adapter) -> None:
    """Raise unless names, places, parameters and whole modules of an adapter are sound (spec F2, F5)."""
    if not adapter.layers:
        raise HoraError("an adapter has at least one layer, got none: was anything adapted? (spec F2)")
    for name, layer in adapter.layers.items():
        if not isinstance(name, str) or not name or re.search("[\0\ud800-\udfff]", name):
            raise HoraError(
                f"a layer name is a non-empty string without NUL or lone surrogates, got {name!r} (spec I1)"
            )
        check_params(layer.spec, layer.shape, layer.params, name=name)
        for key, array in layer.params.items():
            if (dtype := np.asarray(array).dtype) != np.float32:
                raise HoraError(f"layer {name!r}: {key} must be float32, got {dtype}: cast it (spec F5)")
    _check_sites([site for layer in adapter.layers.values() for site in layer.sites.values()])
    _check_leaders(adapter.layers)
    for name, array in adapter.modules.items():
        check_path("a tensor of a whole module", name)
        if np.issubdtype(np.asarray(array).dtype, np.floating) and np.isnan(array).any():
            raise HoraError(f"tensors of whole modules hold numbers, got NaN in {name}: training diverged (spec F5)")
        if ".hora_hyper." in name:
            raise HoraError(f"parameters of HoRA belong to a layer, got {name!r} among the modules (spec F5)")


def check_path(what: str, path: Any) -> None:
    """Raise unless `path` is names joined by dots, without white space or slashes (spec F2)."""
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        raise HoraError(
            f"{what} is named by its dotted path, without white space or slashes, got {path!r}: was the file edited? "
            "(spec F2)"
        )


def _check_sites(sites: Iterable[Site]) -> None:
    by_weight: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        if site.layout.stacked:
            raise HoraError(
                f"files hold one layer at a time, got the stacked layout {site.layout.pattern!r} for {site.module}: "
                "unstack the layers first (spec F2)"
            )
        by_weight.setdefault((site.module, site.parameter), []).append(site)
    for (module, parameter), shared in by_weight.items():
        if len({site.weight_shape for site in shared}) > 1:
            raise HoraError(f"a weight has one shape, got {[s.weight_shape for s in shared]} for {module} (spec F2)")
        for one, other in itertools.combinations(shared, 2):
            if one.layout.overlaps(other.layout, one.weight_shape):
                raise HoraError(
                    f"each part of a weight is adapted once, got {one.layout} and {other.layout} for "
                    f"{module}.{parameter}: give them disjoint windows (spec F2)"
                )


def _check_leaders(layers: Mapping[str, AdapterLayer]) -> None:
    owners: dict[str, str] = {}
    for name, layer in layers.items():
        if (owner := owners.setdefault(layer.leader, name)) != name:
            raise HoraError(
                f"every layer is stored under a module of its own, got {layer.leader} for {owner!r} and {name!r}: "
                "put projections of one module into one layer (spec F2)"
            )
