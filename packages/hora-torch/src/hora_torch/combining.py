"""Weighted sums of adapters in a model (spec F8)."""

from collections.abc import Sequence

import torch
from hora_spec import HoraError, combine, layer_to_json
from hora_spec.files import peft_keys
from peft.tuners.tuners_utils import BaseTuner

from hora_torch.config import HoraConfig
from hora_torch.export import adapter_in
from hora_torch.freezing import keep_frozen


def add_sum(tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Add an adapter whose delta is the weighted sum of others, with free factors that are not trained further.

    Raises
    ------
    HoraError
        As `hora_spec.combine`; or if a name is not that of an adapter, or the new one is. Nothing has changed then.
    """
    if adapter_name in tuner.peft_config:
        raise HoraError(f"a sum is a new adapter, got {adapter_name!r}, which there is: choose another name")
    terms = [adapter_in(tuner.model, name, embeddings=False) for name in adapters]
    total = combine(terms, weights, order=[name for name, _ in tuner.model.named_modules()])
    layers = [layer_to_json(name, layer.spec, layer.sites) for name, layer in total.layers.items()]
    keys = {key: value for key, value in total.config.items() if key != "peft_version"}
    tuner.peft_config[adapter_name] = HoraConfig(**peft_keys(total.layers), **keys, hora_layers=layers)
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except BaseException:
        del tuner.peft_config[adapter_name]
        raise
    for layer in total.layers.values():
        leader = tuner.model.get_submodule(layer.leader)
        hypernet = leader.hora_hyper[adapter_name]
        with torch.no_grad():
            for key, param in hypernet.params().items():
                param.copy_(torch.from_numpy(layer.params[key]))
        hypernet.awaits.clear()
        keep_frozen(leader, adapter_name)
