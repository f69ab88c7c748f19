"""``HoraModel``: HoRA as PEFT sees it."""

import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from hora_spec import HoraError
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils import get_quantization_kwargs
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from hora_torch.adapted_linear import HoraLinear
from hora_torch.attention import HoraMultiheadAttention
from hora_torch.combining import add_sum
from hora_torch.config import HoraConfig
from hora_torch.convolution import HoraConv
from hora_torch.export import rescaled
from hora_torch.hypernet import HoraHypernet
from hora_torch.layer import BASE, HoraLayer, warn_of_rounding
from hora_torch.lifetime import during_call
from hora_torch.planning import make_plan, planned_layer
from hora_torch.saving import check_loaded
from hora_torch.targets import CONVOLUTIONS, base_module
from hora_torch.tied import tied_weights


class HoraModel(BaseTuner):
    """Base model with HoRA adapters; made by `peft.get_peft_model`, not by hand."""

    prefix: str = "hora_"
    tuner_layer_cls = HoraLayer
    target_module_mapping: Mapping[str, list[str]] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        # PEFT passes one config only where there is no PeftModel, which would check what it loads: Transformers' and
        # diffusers' own loading, where a tensor that is missing is a line in a log
        self._loads_unchecked = isinstance(peft_config, HoraConfig)
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Plan the layers of one adapter, then let PEFT visit the targets; on failure the model is as it was.

        The keys of a `state_dict`, if given, choose the targets instead of ``target_modules``: they name the leaders,
        and the projections of each leader name the other targets of its layer.
        """
        config = self.peft_config[adapter_name]
        plan = make_plan(model, config, state_dict)
        before, layers = (config.target_modules, config.hora_layers), [layer.to_json() for layer in plan.layers]
        if config.hora_layers not in (None, layers):
            raise HoraError(
                "a config describes one adapter, got one that was injected before and into other layers: give each "
                "model a HoraConfig of its own"
            )
        config.target_modules, config.hora_layers = plan.target_modules, layers
        if state_dict is not None:
            modules = [module for layer in plan.layers for module in layer.modules]
            state_dict = {f"{name}.{self.prefix}hyper": torch.empty(0) for name in modules}
        trained = [(param, param.requires_grad) for param in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except BaseException:
            config.target_modules, config.hora_layers = before
            _withdraw(model, adapter_name)
            for param, requires_grad in trained:
                param.requires_grad_(requires_grad)
            raise
        _keep_differentiable(model)
        if config.given_layers is not None:
            for hypernet in _hypernets(model, adapter_name):
                hypernet.await_values(needed=self._loads_unchecked)
        if text := plan.warning():
            warnings.warn(text, stacklevel=2)

    def _prepare_adapter_config(self, peft_config: HoraConfig, model_config: dict[str, Any]) -> HoraConfig:
        return peft_config

    def _create_and_replace(
        self,
        peft_config: HoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        plan = planned_layer(peft_config, current_key)
        if plan is None:  # a fused module of which no part is adapted
            return
        sites = {p: site for p, site in plan.sites.items() if site.module == current_key}
        layer = target
        if not isinstance(target, HoraLayer):
            base = base_module(target)
            convolves = isinstance(base, CONVOLUTIONS)
            kind = HoraConv if convolves else HoraLinear
            kind = HoraMultiheadAttention if isinstance(base, nn.MultiheadAttention) else kind
            layer = kind(target)
            layer._active_adapter = self.active_adapter
        leader = None if plan.leader == current_key else self.model.get_submodule(plan.leader)
        layer.requantizing = get_quantization_kwargs(self.model)
        layer.update_layer(adapter_name, plan, sites, leader, peft_config)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
            _use_module_forward(parent)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Adapters move to the base's device when they are attached, and an adapted module holds its base unchanged."""
        setattr(parent, child_name, new_module)

    def _layers(self) -> dict[str, HoraLayer]:
        return {name: module for name, module in self.model.named_modules() if isinstance(module, HoraLayer)}

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base: all layers, or on failure none.

        Raises
        ------
        HoraError
            If a merge is refused, or an adapted weight is also the weight of another module, which would change too.
        """
        for name, owners in tied_weights(self.model, adapter_names).items():
            raise HoraError(
                f"an adapted weight that is merged belongs to one module, that of {name!r} is tied: {owners[:4]}: give "
                "the modules weights of their own, or serve the adapter as LoRA with hora_torch.export_lora (spec M3)"
            )
        self._check_merge_allowed()
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, BaseTunerLayer)}
        before = {layer: list(layer.merged_adapters) for layer in layers.values()}
        rounded = {}
        try:
            for name, layer in layers.items():
                with onload_layer(layer):
                    if not isinstance(layer, HoraLayer):  # PEFT's, of trained rows of embeddings
                        layer.merge(safe_merge, adapter_names)
                    elif layer.merge_silently(safe_merge, adapter_names):
                        rounded[name] = layer
            warn_of_rounding(rounded, stacklevel=3)
        except BaseException:
            for layer, names in before.items():
                with onload_layer(layer):
                    if isinstance(layer, HoraLayer):
                        layer.restore_merged(names)
                    elif layer.merged_adapters != names:
                        layer.unmerge()
            raise

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        **options: Any,
    ) -> None:
        """Add an adapter whose delta is the weighted sum of others, exactly (spec F8).

        It has free factors, of the sum of the ranks, as `hora_torch.freeze` makes them; they are not trained further.

        Raises
        ------
        HoraError
            If `combination_type` is not ``"cat"``, a name or weight is wrong, or the adapters have no such sum. Nothing
            has changed then.
        """
        if combination_type != "cat" or any(value is not None for value in options.values()):
            raise HoraError(
                f"adapters are combined exactly, by combination_type='cat', got {combination_type!r} with {options}: "
                "for an approximation of lower rank export them with export_lora and combine those"
            )
        add_sum(self, adapters, weights, adapter_name)

    def unmerge_adapter(self) -> None:
        """Restore the base: all layers, or where somebody else wrote to a merged weight, none."""
        for layer in self._layers().values():
            if layer.merged:
                with onload_layer(layer):
                    layer.check_unmergeable()
        super().unmerge_adapter()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """Merge every layer before the first one is unloaded, so that a refusal leaves a working adapted model."""
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        _restore_module_forward(model)
        return model

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Parameters are float32 from the start; without autocast they follow the base."""
        if autocast_adapter_dtype:
            return
        for module in self.model.modules():
            if isinstance(module, HoraLayer) and adapter_name in module.hora_hyper:
                dtype = next((param.dtype for param in module.get_base_layer().parameters()), None)
                if dtype is not None and dtype.is_floating_point:
                    module.hora_hyper[adapter_name].to(dtype)

    def _needed(self, names: Iterable[str] | None = None) -> Iterator[HoraHypernet]:
        """Hypernetworks of the named, by default the active, adapters, where they were planned."""
        for name in self.active_adapters if names is None else names:
            config = self.peft_config.get(name)
            for entry in (config and config.hora_layers) or ():
                layer: nn.Module | None = self.model
                for part in entry["leader"].split("."):
                    layer = None if layer is None else layer._modules.get(part)
                if isinstance(layer, HoraLayer) and name in layer.hora_hyper:
                    yield layer.hora_hyper[name]

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[object]:
        """One generation of factors for the call; ``adapter_names`` of a mixed batch go to every adapted module."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            return during_call(self.model, self._needed)
        return self._mixed_batch(names, kwargs.get("num_beams"))

    @contextmanager
    def _mixed_batch(self, names: Sequence[str], beams: Any) -> Generator[None, None, None]:
        if self.training:
            raise HoraError("Cannot pass `adapter_names` when the model is in training mode: call model.eval() first")
        known = {name for module in self.modules() if isinstance(module, HoraLayer) for name in module.hora_attached}
        if unknown := sorted(set(names) - known - {BASE}):
            raise HoraError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; there are {sorted(known)}"
            )
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
            with during_call(self.model, partial(self._needed, dict.fromkeys(names))):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: HoraConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Tensors of an adapter as files hold them, which is without the scale at which it acts here."""
        if scale := rescaled(model, adapter_name):
            warnings.warn(f"{adapter_name!r} acts at {scale}, which is not saved", stacklevel=2)
        return super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)

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
        """Checkpoint keys become model keys; what does not fit is refused before the model changes (spec F5).

        An adapter that was injected for this checkpoint alone leaves the model again.
        """
        try:
            if any(adapter_name in layer.merged_adapters for layer in model.modules() if isinstance(layer, HoraLayer)):
                raise HoraError(
                    f"values are loaded into an adapter that is not merged, {adapter_name!r} is: unmerge first"
                )
            check_loaded(model, config, adapter_name, state_dict)
            remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
            _check_fits(model, adapter_name, remapped)
        except HoraError:
            hypernets = _hypernets(model, adapter_name)
            if hypernets and all(hypernet.awaits for hypernet in hypernets):
                _withdraw(model, adapter_name)
                model.peft_config.pop(adapter_name, None)
            raise
        for hypernet in _hypernets(model, adapter_name):
            hypernet.awaits.clear()
        return remapped


def _hypernets(model: nn.Module, adapter_name: str) -> list[HoraHypernet]:
    layers = [module for module in model.modules() if isinstance(module, HoraLayer)]
    return [layer.hora_hyper[adapter_name] for layer in layers if adapter_name in layer.hora_hyper]


def _check_fits(model: nn.Module, adapter_name: str, given: Mapping[str, Tensor]) -> None:
    """Raise unless tensors are the parameters of an adapter, exactly and finite."""
    marker = ".hora_hyper."
    expected = {key: value for key, value in model.state_dict().items() if f"{marker}{adapter_name}." in key}
    missing = sorted(expected.keys() - given.keys())
    extra = sorted(key for key in given.keys() - expected.keys() if marker in key)
    if missing or extra:
        raise HoraError(
            f"a checkpoint holds exactly the parameters of the adapter, missing {missing[:3]}, extra {extra[:3]}: "
            "config and tensors are of different adapters, or the file is damaged (spec F5)"
        )
    for key, value in expected.items():
        if given[key].shape != value.shape:
            raise HoraError(f"{key} must have shape {tuple(value.shape)}, got {tuple(given[key].shape)} (spec F5)")
        if not given[key].is_meta and not torch.isfinite(given[key]).all():
            raise HoraError(f"{key} must be finite, got NaN or infinity: training diverged (spec F5)")


def _withdraw(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of the model, with every module that was wrapped for it alone."""
    for name, module in list(model.named_modules()):
        parent_name, _, own = name.rpartition(".")
        if isinstance(module, HoraLayer) and adapter_name in module.hora_attached:
            module.delete_adapter(adapter_name)
            if not module.hora_attached:
                setattr(model.get_submodule(parent_name), own, module.base_layer)
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            if len(module.modules_to_save) == 1:
                setattr(model.get_submodule(parent_name), own, module.original_module)
            else:
                module.delete_adapter(adapter_name, [])
    _restore_module_forward(model)


def _add_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"adapter_names": names}


def _use_module_forward(attention: nn.Module) -> None:
    """EVA, BEiT and Swin v2 of timm multiply with ``qkv.weight`` past the module unless told to add the bias apart."""
    if getattr(attention, "qkv_bias_separate", None) is False and getattr(attention, "q_bias", None) is not None:
        attention.qkv_bias_separate = True
        attention._hora_restores_qkv_bias = True


def _keep_differentiable(model: nn.Module) -> None:
    """Where a CPU has AVX512-BF16, bitsandbytes 0.50 packs four bits for good when it first evaluates: the codes stand
    for other floats than in training, and no gradient passes from then on, in training neither.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def _restore_module_forward(model: nn.Module) -> None:
    """Undo `_use_module_forward` where no adapter is left."""
    for module in model.modules():
        adapted = any(isinstance(child, HoraLayer) for child in module.children())
        if not adapted and module.__dict__.pop("_hora_restores_qkv_bias", False):
            module.qkv_bias_separate = False
