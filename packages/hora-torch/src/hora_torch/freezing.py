"""Factors in place of the hypernetworks that generate them: for serving."""

import copy
from typing import Any

import torch
from hora_spec import AdapterSpec, HoraError
from torch import nn

from hora_torch.export import adapter_name_of
from hora_torch.hypernet import HoraHypernet
from hora_torch.layer import HoraLayer


def freeze(model: nn.Module, adapter_name: str | None = None) -> None:
    """Keep the factors of an adapter for good, and drop the hypernetworks that generated them.

    The adapter computes, merges, exports and saves what it did, from as many values as its LoRA export has: it becomes
    one whose factors are free, A common to all heads or per head as it was (``sharing`` ``"a"`` or ``"none"``). Its
    parameters are not trained any further. There is no way back: save the adapter before if it may be trained again.

    Parameters
    ----------
    model
        A ``PeftModel``, or a model into which an adapter was injected.
    adapter_name
        Which adapter; may be left out when the model has one.

    Raises
    ------
    HoraError
        If there is no such adapter, or its factors are not finite. Nothing has changed then.

    Examples
    --------
    >>> import torch, peft, hora_torch
    >>> config = hora_torch.HoraConfig(r=2, target_modules=["0"], num_heads=2)
    >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    >>> hora_torch.freeze(model)
    >>> [(name, tuple(param.shape)) for name, param in model.named_parameters() if "hora_hyper" in name]
    [('base_model.model.0.hora_hyper.default.a._0', (2, 4)), ('base_model.model.0.hora_hyper.default.b._0', (2, 2, 2))]
    """
    name = adapter_name_of(model, adapter_name)
    leaders = [module for module in model.modules() if isinstance(module, HoraLayer) and name in module.hora_hyper]
    frozen = {leader: _frozen(leader.hora_hyper[name]) for leader in leaders}
    for leader, hypernet in frozen.items():
        leader.hora_hyper[name] = hypernet
        keep_frozen(leader, name)
    config = model.peft_config[name] = copy.copy(model.peft_config[name])  # others may have the same
    specs = {hypernet.name: hypernet.spec for hypernet in frozen.values()}
    config.hora_layers = [entry | {"spec": specs[entry["name"]].to_dict()} for entry in config.hora_layers]
    config.given_layers = config.hora_layers
    for key, value in _free(config.spec()).items():
        setattr(config, key, value)


def keep_frozen(leader: HoraLayer, adapter_name: str) -> None:
    """No method of PEFT shall train the parameters that a leader owns."""
    leader.frozen_peft_weight_names = leader.frozen_peft_weight_names | {adapter_name: ("hora_hyper",)}


def _frozen(hypernet: HoraHypernet) -> HoraHypernet:
    spec = hypernet.spec.replace(**_free(hypernet.spec))
    with torch.no_grad():
        factors = hypernet()
    with torch.device("meta"):
        result = HoraHypernet(spec, hypernet.layer, name=hypernet.name, seed=hypernet.seed)
    values: dict[str, Any] = {f"a.{p}": value.a for p, value in factors.items()}
    values |= {f"b.{p}": value.b for p, value in factors.items()}
    for key, value in values.items():
        if not torch.isfinite(value).all():
            raise HoraError(f"only finite factors are kept, those of {hypernet.name!r} are not: training diverged")
        module, _, own = key.rpartition(".")
        setattr(result.get_submodule(module), own, nn.Parameter(value.clone(), requires_grad=False))
    return result.train(hypernet.training)


def _free(spec: AdapterSpec) -> dict[str, Any]:
    """What a spec becomes when both factors are parameters."""
    sharing = "a" if spec.sharing in ("full", "a") else "none"
    free = {"a_source": "direct", "gain": "transfer", "residual": False, "gate": None, "tie_a": False}
    return {"sharing": sharing, **free}
