"""What an adapted model must compute, told from its current parameters by the reference alone."""

import copy
from collections.abc import Mapping
from typing import Any

import hora_spec
import numpy as np
import peft
import torch
from hora_spec import AdapterSpec, LayerShape, Site, layer_from_json, reference
from hora_torch import HoraConfig
from hora_torch.layer import HoraLayer
from torch import Tensor, nn

from .conftest import Family

Layers = Mapping[str, tuple[AdapterSpec, Mapping[str, Site], Mapping[str, np.ndarray]]]


def config(**kwargs: Any) -> HoraConfig:
    """A small adapter whose update is not zero."""
    return HoraConfig(**({"r": 2, "hidden_dim": 6, "head_embed_dim": 5, "init_weights": False} | kwargs))


def adapted(family: Family, **kwargs: Any) -> peft.PeftModel:
    """A model of `family` with such an adapter, in evaluation."""
    return peft.get_peft_model(family.model(), config(**kwargs)).eval()


def output(result: Any) -> Tensor:
    """The tensor of a model's result."""
    return result if isinstance(result, Tensor) else result.logits


def evaluate(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Output in evaluation, without gradients."""
    with torch.no_grad():
        return output(model.eval()(**inputs))


def parameters(model: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    """Every parameter of the hypernetworks, as the leader's name, ``hora_hyper`` and the canonical name (spec F1)."""
    marker = f".hora_hyper.{adapter_name}."
    found = {}
    for key, param in model.named_parameters():
        leader, marked, name = key.removeprefix("base_model.model.").partition(marker)
        if marked:
            found[f"{leader}.hora_hyper.{name.replace('__', '.')}"] = param
    return found


def current(model: nn.Module, adapter_name: str = "default") -> Layers:
    """Spec, sites and present parameters of every layer."""
    params = {key: param.detach().double().numpy() for key, param in parameters(model, adapter_name).items()}
    layers = {}
    for entry in model.peft_config[adapter_name].hora_layers:
        name, spec, sites = layer_from_json(entry)
        prefix = f"{entry['leader']}.hora_hyper."
        own = {key.removeprefix(prefix): value for key, value in params.items() if key.startswith(prefix)}
        layers[name] = (spec, sites, own)
    return layers


def written(directory: Any) -> Layers:
    """The same of an adapter on disk."""
    layers = hora_spec.load_adapter(directory).layers
    return {name: (layer.spec, layer.sites, layer.params) for name, layer in layers.items()}


def merged(base: nn.Module, layers: Layers) -> nn.Module:
    """`base` in float64 with the update of every layer added to its weights, by the reference."""
    base = copy.deepcopy(base).double()
    for spec, sites, params in layers.values():
        deltas = reference.delta(spec, LayerShape({p: site.projection for p, site in sites.items()}), params)
        for p, site in sites.items():
            weight = getattr(base.get_submodule(site.module), site.parameter)
            weight.data = torch.from_numpy(reference.merge(weight.detach().numpy(), deltas[p], site.layout))
    return base


def double(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs for a model in float64."""
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def truth(family: Family, layers: Layers) -> Tensor:
    """Output of a fresh base with these layers merged by hand."""
    return evaluate(merged(family.model(), layers), double(family.inputs())).float()


def agree(actual: Tensor, expected: Tensor) -> None:
    """Equal within what float32 may lose on the way through a tiny model."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def differ(actual: Tensor, expected: Tensor) -> None:
    """So far apart that `agree` can tell."""
    assert (actual - expected).abs().max() > 1e-2, "the two must differ for this test to mean anything"


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a failure could change, and the tensors, kept alive for their identities."""
    return {
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "tensors": [
            (name, param, param.detach().clone(), param.requires_grad) for name, param in model.named_parameters()
        ],
        "adapters": sorted(getattr(model, "peft_config", {})),
        "configs": {name: found.to_dict() for name, found in getattr(model, "peft_config", {}).items()},
        "active": [module.active_adapters for module in model.modules() if isinstance(module, HoraLayer)],
        "merged": [list(module.merged_adapters) for module in model.modules() if isinstance(module, HoraLayer)],
        "hooks": sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()),
    }


def assert_unchanged(model: nn.Module, before: Mapping[str, Any]) -> None:
    """Nothing that `snapshot` saw is another, to the last bit."""
    after = snapshot(model)
    tensors = zip(after.pop("tensors"), before["tensors"], strict=True)
    for key, value in after.items():
        assert value == before[key], key
    for (name, param, value, trains), (old_name, old_param, old_value, old_trains) in tensors:
        assert (name, trains) == (old_name, old_trains)
        assert param is old_param, name
        bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (value, old_value)]
        assert torch.equal(*bits), name
