"""``HoraModel``: HoRA as PEFT sees it."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from hora_spec import HoraError
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from hora_torch.attention import HoraMultiheadAttention
from hora_torch.config import HoraConfig
from hora_torch.layer import BASE, HoraLayer, HoraLinear
from hora_torch.targets import LayerPlan, base_module, default_targets, no_match, plan, targets_of


class HoraModel(BaseTuner):
    """Base model with HoRA adapters; made by `peft.get_peft_model`, not by hand."""

    prefix: str = "hora_"
    tuner_layer_cls = HoraLayer
    target_module_mapping: Mapping[str, list[str]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Plan the layers of one adapter, then let PEFT visit the targets.

        The keys of a `state_dict`, if given, choose the targets instead of ``target_modules``: they name the leaders,
        and the projections of each leader name the other targets of its layer.
        """
        self._chosen = None if state_dict is None else targets_of(model, state_dict)
        if self._chosen is not None:
            state_dict = {f"{name}.{self.prefix}hyper": torch.empty(0) for name in self._chosen}
        self._plans: dict[str, LayerPlan] = {}
        self._leaders: dict[str, HoraLayer] = {}
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        del self._chosen, self._plans, self._leaders

    def _prepare_adapter_config(self, peft_config: HoraConfig, model_config: dict[str, Any]) -> HoraConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = default_targets(self.model, peft_config)
            if not peft_config.target_modules:
                raise no_match(self.model, peft_config)
        return peft_config

    def _prepare_model(self, peft_config: HoraConfig, model: nn.Module) -> None:
        if peft_config.target_modules == DUMMY_TARGET_MODULES:
            return
        names = self._chosen
        if names is None:
            _maybe_include_all_linear_layers(peft_config, model)
            inside = tuple(f"{key}." for key, module in model.named_modules() if isinstance(module, BaseTunerLayer))
            names = [
                key
                for key, _ in model.named_modules()
                if key and not key.startswith(inside) and self._check_target_module_exists(peft_config, key)
            ]
        if not names and not peft_config.exclude_modules and not peft_config.modules_to_save:
            raise no_match(model, peft_config)
        plans = plan(model, names, peft_config)
        self._plans = {module: layer for layer in plans for module in layer.modules}
        peft_config.hora_layers = [layer.to_json() for layer in plans]

    def _create_and_replace(
        self,
        peft_config: HoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        layer_plan = self._plans.get(current_key)
        if layer_plan is None:  # a fused module of which no part is adapted
            return
        sites = {p: site for p, site in layer_plan.sites.items() if site.module == current_key}
        layer = target
        if not isinstance(target, HoraLayer):
            kind = HoraMultiheadAttention if isinstance(base_module(target), nn.MultiheadAttention) else HoraLinear
            layer = kind(target)
            layer._active_adapter = self.active_adapter
        layer.update_layer(adapter_name, layer_plan, sites, self._leaders.get(layer_plan.name), peft_config)
        self._leaders.setdefault(layer_plan.name, layer)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
            _use_module_forward(parent)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Adapters move to the base's device when they are attached, and an adapted module holds its base unchanged."""
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for module in model.modules():
            if module.__dict__.pop("_hora_restores_qkv_bias", False):
                module.qkv_bias_separate = False
        return model

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Parameters are float32 from the start; without autocast they follow the base."""
        if autocast_adapter_dtype:
            return
        for module in self.model.modules():
            if isinstance(module, HoraLayer) and adapter_name in module.hora_hyper:
                dtype = next(module.get_base_layer().parameters()).dtype
                if dtype.is_floating_point:
                    module.hora_hyper[adapter_name].to(dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Generator[None, None, None]:
        """Pass ``adapter_names`` of a mixed batch on to every adapted module."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise HoraError("Cannot pass `adapter_names` when the model is in training mode: call model.eval() first")
        known = {name for module in self.modules() if isinstance(module, HoraLayer) for name in module.hora_attached}
        if unknown := sorted(set(names) - known - {BASE}):
            raise HoraError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; there are {sorted(known)}"
            )
        beams = kwargs.get("num_beams")
        repeated = [name for name in names for _ in range(beams)] if isinstance(beams, int) and beams > 1 else names
        inner = getattr(self.model, "get_encoder", lambda: None)() if repeated is not names else None
        encoder = set(inner.modules()) if isinstance(inner, nn.Module) and inner is not self.model else set()
        handles = [
            module.register_forward_pre_hook(
                partial(_add_adapter_names, names=names if module in encoder else repeated), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, (HoraLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """``hora_hyper.default.a_out.q`` becomes ``hora_hyper.a_out.q`` (spec F1)."""
        marker = f".{cls.prefix}hyper.{adapter_name}."
        if marker in key:
            return key.replace(marker, f".{cls.prefix}hyper.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: HoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Checkpoint keys become model keys; what does not fit is refused before the model changes (spec F5)."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        marker = f".{cls.prefix}hyper."
        expected = {key: value for key, value in model.state_dict().items() if f"{marker}{adapter_name}." in key}
        missing = sorted(expected.keys() - remapped.keys())
        extra = sorted(key for key in remapped.keys() - expected.keys() if marker in key)
        if missing or extra:
            raise HoraError(
                f"a checkpoint holds exactly the parameters of the adapter, missing {missing[:3]}, extra {extra[:3]}: "
                "config and tensors are of different adapters, or the file is damaged (spec F5)"
            )
        for key, value in expected.items():
            given = remapped[key]
            if given.shape != value.shape:
                raise HoraError(f"{key} must have shape {tuple(value.shape)}, got {tuple(given.shape)} (spec F5)")
            if not given.is_meta and not torch.isfinite(given).all():
                raise HoraError(f"{key} must be finite, got NaN or infinity: training diverged (spec F5)")
        return remapped


def _add_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"adapter_names": names}


def _use_module_forward(attention: nn.Module) -> None:
    """EVA, BEiT and Swin v2 of timm multiply with ``qkv.weight`` past the module unless told to add the bias apart."""
    if getattr(attention, "qkv_bias_separate", None) is False and getattr(attention, "q_bias", None) is not None:
        attention.qkv_bias_separate = True
        attention._hora_restores_qkv_bias = True
