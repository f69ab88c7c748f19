"""Weights that several modules of a model share."""

from collections.abc import Sequence

from torch import nn

from hora_torch.layer import HoraLayer


def tied_weights(model: nn.Module, adapter_names: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Adapted layers whose weight is also that of other modules: path of the layer to all names of its weight.

    Counted are the named, by default the active, adapters of each layer.
    """
    owners: dict[nn.Parameter, list[str]] = {}
    for path, module in model.named_modules():  # a module that stands in several places is one owner
        for name, param in module._parameters.items():
            owners.setdefault(param, []).append(f"{path}.{name}") if param is not None else None
    tied = {}
    for name, layer in model.named_modules():
        names = (adapter_names or layer.active_adapters) if isinstance(layer, HoraLayer) else ()
        for attached in [layer.hora_attached[key] for key in names if key in layer.hora_attached]:
            for parameter in {site.parameter for site in attached.sites.values()}:
                stored = layer.get_base_layer()._parameters.get(parameter)
                if stored is not None and not stored.is_meta and len(owners.get(stored, ())) > 1:
                    tied[name] = owners[stored]
    return tied
