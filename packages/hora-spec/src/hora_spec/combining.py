"""Weighted sums of adapters, as adapters (spec F8)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hora_spec import reference
from hora_spec.adapter import Adapter, AdapterLayer, Site, check_adapter
from hora_spec.errors import HoraError
from hora_spec.shapes import LayerShape
from hora_spec.spec import AdapterSpec

_KEPT = ("task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version")


def combine(adapters: Sequence[Adapter], weights: Sequence[float], *, order: Sequence[str] = ()) -> Adapter:
    """The adapter whose delta is the sum of weight times delta, by concatenating ranks (spec F8).

    Parameters
    ----------
    adapters
        Of one base model; each may adapt other layers and projections than the others.
    weights
        A finite number for each.
    order
        Paths of modules in model order. May be left out where one of the adapters adapts all modules of each layer.

    Returns
    -------
    Adapter
        With free factors and scaling 1. A is common to all heads if it is in every adapter, else free per head. The
        rank of a layer is the sum of the ranks of the adapters that have it.

    Raises
    ------
    HoraError
        If an adapter is not sound, holds modules that were trained whole, or adapts a projection with other heads or
        rows than another does.
    """
    if not adapters or len(adapters) != len(weights) or not all(map(math.isfinite, weights)):
        raise HoraError(f"every adapter has a finite weight, got {len(adapters)} with {list(weights)} (spec F8)")
    for adapter in adapters:
        check_adapter(adapter)
        if adapter.modules:
            raise HoraError(
                f"a sum is of low-rank updates, got modules trained whole, {sorted(adapter.modules)[:3]}: train "
                "without modules_to_save and bias, or merge the adapters one after the other (spec F8)"
            )
    modules = {module for a in adapters for layer in a.layers.values() for module in layer.modules}
    if order and (strangers := sorted(modules - set(order))):
        raise HoraError(f"order has the paths of all modules, got none for {strangers[:3]}: is it the model? (spec F8)")
    shared = all(layer.spec.shares_a for adapter in adapters for layer in adapter.layers.values())
    layers: dict[str, AdapterLayer] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.layers):
        terms = [(a.layers[name], weight) for a, weight in zip(adapters, weights, strict=True) if name in a.layers]
        layers[name] = _sum(name, terms, _sites(name, [layer.sites for layer, _ in terms], order), shared)
    if order:
        layers = dict(sorted(layers.items(), key=lambda item: order.index(item[1].leader)))
    config = {key: value for key, value in adapters[0].config.items() if key in _KEPT}
    result = Adapter(layers, config)
    check_adapter(result)
    return result


def _sites(name: str, found: Sequence[Mapping[str, Site]], order: Sequence[str]) -> dict[str, Site]:
    """The places of all terms of a layer, in model order."""
    sites: dict[str, Site] = {}
    for places in sorted(found, key=len, reverse=True):
        for p, site in places.items():
            if sites.setdefault(p, site) != site:
                raise HoraError(
                    f"adapters of a sum agree on rows and heads, got {sites[p]} and {site} for {p!r} of {name!r}: "
                    "train them with one num_heads (spec F8)"
                )
    modules = {site.module for site in sites.values()}
    if order:
        return dict(sorted(sites.items(), key=lambda item: order.index(item[1].module)))
    if not any(modules == {site.module for site in places.values()} for places in found):
        raise HoraError(
            f"the first module of a layer leads, which of {sorted(modules)} of {name!r} that is no adapter says: pass "
            "order, the paths of modules in model order (spec F8)"
        )
    return sites


def _sum(
    name: str, terms: Sequence[tuple[AdapterLayer, float]], sites: Mapping[str, Site], shared: bool
) -> AdapterLayer:
    rank = sum(layer.spec.rank for layer, _ in terms)
    spec = AdapterSpec(rank, sharing="a" if shared else "none")
    shape = LayerShape({p: site.projection for p, site in sites.items()})
    params: dict[str, NDArray[Any]] = {}
    factors = [reference.factors(layer.spec, layer.shape, layer.params) for layer, _ in terms]
    for kind in ("a", "b"):
        for p, projection in shape.items():
            heads, width = projection.num_heads, projection.head_dim
            wide = (heads, rank, projection.embed_dim) if kind == "a" else (heads, width, rank)
            total, start = np.zeros(wide), 0
            for (layer, weight), generated in zip(terms, factors, strict=True):
                stop = start + layer.spec.rank
                if p in generated:
                    if kind == "a":
                        total[:, start:stop] = generated[p].a  # one A for all heads, or one for each
                    else:
                        total[:, :, start:stop] = weight * layer.spec.scaling * generated[p].b
                start = stop
            with np.errstate(over="ignore"):  # checked for what is not finite with the whole adapter
                params[f"{kind}.{p}"] = (total[0] if kind == "a" and shared else total).astype(np.float32)
    return AdapterLayer(spec, sites, params)
