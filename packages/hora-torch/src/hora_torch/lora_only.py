"""Functions of PEFT that know LoRA by its names: HoRA is made known to them, or they refuse it.

Each would else do something else without a word (as of PEFT 0.21). What they look up when they are called is exchanged,
so that it does not matter who imported them before.
"""

import functools
from typing import Any

import peft.helpers
from hora_spec import HoraError
from peft.optimizers import lorafa, loraplus
from peft.utils import PeftType, hotswap
from torch import nn

from hora_torch.hotswap import swap
from hora_torch.layer import HoraLayer


def install() -> None:
    """Make HoRA known, once."""
    if isinstance(peft.helpers.LoraLayer, tuple):
        return
    loraplus.get_parameter_names = _loraplus_names(loraplus.get_parameter_names)
    lorafa.LoraFAOptimizer.__init__ = _lorafa_init(lorafa.LoraFAOptimizer.__init__)
    hotswap.CONFIG_KEYS_TO_CHECK[PeftType.HORA] = []  # `swap` compares the layers
    hotswap.hotswap_adapter_from_state_dict = _hotswap(hotswap.hotswap_adapter_from_state_dict)
    # rescale_adapter_scale asks isinstance(module, LoraLayer), and then for module.scaling, which both have
    peft.helpers.LoraLayer = (peft.helpers.LoraLayer, HoraLayer)


def _loraplus_names(original: Any) -> Any:
    """``create_loraplus_optimizer`` finds B by the name ``lora_B`` and would train all of HoRA as A."""

    @functools.wraps(original)
    def names(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(module, HoraLayer) for module in model.modules()):
            raise HoraError(
                "create_loraplus_optimizer knows lora_A and lora_B by name, got a model with HoRA: use "
                "optimizer_cls(hora_torch.param_groups(model, lr, ratio=loraplus_lr_ratio))"
            )
        return original(model, *args, **kwargs)

    return names


def _lorafa_init(original: Any) -> Any:
    """``create_lorafa_optimizer`` freezes what is called ``lora_A`` and would be AdamW for HoRA."""

    @functools.wraps(original)
    def init(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        params = list(params)
        names = [name for group in params if isinstance(group, dict) for name in group.get("names", ())]
        if any(".hora_hyper." in name for name in names):
            raise HoraError(
                "create_lorafa_optimizer freezes what is called lora_A, got a model with HoRA: freeze the group 'A' of "
                "hora_torch.param_groups(model, lr) instead"
            )
        original(self, params, *args, **kwargs)

    return init


def _hotswap(original: Any) -> Any:
    """``hotswap_adapter`` calls this when it has read the new adapter, and knows the parameters of LoRA alone."""

    @functools.wraps(original)
    def hotswap_adapter_from_state_dict(
        model: nn.Module, state_dict: dict[str, Any], adapter_name: str, config: Any, *args: Any, **kwargs: Any
    ) -> None:
        if config.peft_type == PeftType.HORA:
            swap(model, state_dict, adapter_name, config)
        else:
            original(model, state_dict, adapter_name, config, *args, **kwargs)

    return hotswap_adapter_from_state_dict
