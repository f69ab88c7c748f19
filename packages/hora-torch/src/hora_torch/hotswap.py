"""The values of one adapter in the place of another's, while everything that was compiled stays (PEFT's hotswap)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from hora_spec import Adapter, AdapterLayer, HoraError, combine, layer_from_json
from hora_spec.adapter import check_adapter
from numpy.typing import NDArray
from torch import Tensor, nn

from hora_torch.config import HoraConfig
from hora_torch.layer import HoraLayer
from hora_torch.saving import check_loaded

_Values = dict[Tensor, Tensor]


def swap(model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str, config: HoraConfig) -> None:
    """Write another adapter into the parameters of one, in place.

    Adapters of equal layers exchange their parameters. Into one with free factors, as `hora_torch.freeze` and
    ``add_weighted_adapter`` make them, go the factors of any adapter that fits: of at most its rank, on some of its
    projections. What the new adapter lacks becomes zero.

    Parameters
    ----------
    model
        With the adapter, not merged.
    state_dict
        Tensors of the new adapter by their keys in the model.
    adapter_name
        Name of the old adapter, which stays.
    config
        Config of the new adapter, with its layers.

    Raises
    ------
    HoraError
        If the new adapter does not fit, or the old one is merged. Nothing has changed then.
    """
    leaders = {path.removeprefix("base_model.model."): layer for path, layer in _layers(model, adapter_name)}
    if any(adapter_name in layer.merged_adapters for layer in leaders.values()):
        raise HoraError(f"values are swapped while the adapter is not merged, {adapter_name!r} is: unmerge it first")
    new = _adapter(model, state_dict, adapter_name, config)
    slot = model.peft_config[adapter_name]
    if config.hora_layers == slot.hora_layers:
        found = {layer.leader: layer.params for layer in new.layers.values()}
    else:
        order = [name.removeprefix("base_model.model.") for name, _ in model.named_modules()]
        found = _widened(new, [layer_from_json(entry) for entry in slot.hora_layers], order)
    owned = {path: leaders[path].hora_hyper[adapter_name] for path in found}
    with torch.no_grad():
        for path, hypernet in owned.items():
            for key, param in hypernet.params().items():
                param.copy_(torch.from_numpy(found[path][key]))
            hypernet.awaits.clear()


def _layers(model: nn.Module, adapter_name: str) -> list[tuple[str, HoraLayer]]:
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, HoraLayer)]
    return [(name.removeprefix("_orig_mod."), layer) for name, layer in found if adapter_name in layer.hora_attached]


def _adapter(model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str, config: HoraConfig) -> Adapter:
    """The new adapter, sound, from keys in the model."""
    marker, kept = f".hora_hyper.{adapter_name}.", ".hora_hyper."
    tensors = {kept.join(key.rsplit(marker, 1)): value for key, value in state_dict.items()}
    check_loaded(model, config, adapter_name, tensors)
    if config.hora_layers is None:
        raise HoraError("a config of an adapter describes its layers, got none: save the adapter again (spec F2)")
    layers = {}
    for name, spec, sites in map(layer_from_json, config.hora_layers):
        prefix = f"base_model.model.{next(iter(sites.values())).module}{kept}"
        own = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        layers[name] = AdapterLayer(spec, sites, {key: value.cpu().float().numpy() for key, value in own.items()})
    if tensors:
        raise HoraError(
            f"parameters of HoRA can be swapped, got also {sorted(tensors)[:3]}: load the adapter under another name"
        )
    adapter = Adapter(layers)
    check_adapter(adapter)
    return adapter


def _widened(new: Adapter, slot: list[Any], order: list[str]) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Free factors of the new adapter, filled up with zeros to the shapes of the slot, by leader."""
    total = combine([new], [1.0], order=order)
    slots = {name: (spec, sites) for name, spec, sites in slot}
    for name, layer in total.layers.items():
        spec, sites = slots.get(name, (layer.spec, {}))
        fits = spec.rank >= layer.spec.rank and layer.sites.items() <= sites.items()
        free = not (spec.generates_a or spec.generates_b or spec.tie_a)
        if not (fits and free) or (spec.shares_a and not layer.spec.shares_a):
            raise HoraError(
                "an adapter is swapped for one of equal layers, or into one with free factors that has its "
                f"projections and at least its rank, got {layer.spec.rank} on {sorted(layer.sites)} of {name!r} for "
                f"{spec} on {sorted(sites)}: freeze a larger adapter first (hora_torch.freeze), or load it beside"
            )
    found = {}
    for name, (spec, sites) in slots.items():
        layer, params = total.layers.get(name), {}
        for p, site in sites.items():
            shape = site.projection
            a = np.zeros((*(() if spec.shares_a else (shape.num_heads,)), spec.rank, shape.embed_dim), np.float32)
            b = np.zeros((shape.num_heads, shape.head_dim, spec.rank), np.float32)
            if layer is not None and p in layer.sites:
                a[..., : layer.spec.rank, :] = layer.params[f"a.{p}"]
                b[..., : layer.spec.rank] = layer.params[f"b.{p}"] / spec.scaling
            params |= {f"a.{p}": a, f"b.{p}": b}
        found[next(iter(sites.values())).module] = params
    return found
