"""From a model to an adapter in memory, and from there to LoRA."""

import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import align_module_device
from hora_spec import Adapter, AdapterLayer, HoraError, layer_from_json
from hora_spec import export_lora as write_lora
from hora_spec.files import RESERVED
from numpy.typing import DTypeLike
from peft.utils import get_peft_model_state_dict
from torch import nn

from hora_torch.layer import HoraLayer
from hora_torch.sharding import is_sharded


def to_adapter(model: nn.Module, adapter_name: str | None = None) -> Adapter:
    """The adapter of a model as `hora_spec.load_adapter` would read it.

    Parameters
    ----------
    model
        A ``PeftModel``, or a model into which an adapter was injected.
    adapter_name
        Which adapter; may be left out when the model has one.

    Returns
    -------
    Adapter
        Its ``modules`` are what PEFT saves beside the factors: modules trained whole, and embeddings that were resized
        since the base model was loaded.

    Raises
    ------
    HoraError
        If there is no such adapter, or it acts at another scale than that of its training.
    """
    return adapter_in(model, adapter_name)


def adapter_in(model: nn.Module, adapter_name: str | None, *, embeddings: str | bool = "auto") -> Adapter:
    """As `to_adapter`; without `embeddings` those that were resized stay with the model."""
    name = adapter_name_of(model, adapter_name)
    if scale := rescaled(model, name):
        raise HoraError(
            f"an adapter is taken out as it was trained, {name!r} acts at {scale}: call unscale_layer() of the adapted "
            "modules, or make the weight its own with add_weighted_adapter"
        )
    config = model.peft_config[name]
    with _onloaded(model, name):
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=embeddings)
        tensors = {key.removeprefix("base_model.model."): _numpy(key, value) for key, value in state.items()}
    layers = {}
    for entry in config.hora_layers:
        layer_name, spec, sites = layer_from_json(entry)
        prefix = f"{entry['leader']}.hora_hyper."
        params = {key: tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        params = {key.removeprefix(prefix): value.astype(np.float32) for key, value in params.items()}
        layers[layer_name] = AdapterLayer(spec, sites, params)
    keys = {key: value for key, value in config.to_dict().items() if key not in RESERVED}
    return Adapter(layers, keys, tensors)


def export_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    dtype: DTypeLike = np.float32,
    compact: bool = False,
    for_server: str | None = None,
) -> None:
    """Write an adapter as a standard LoRA adapter that computes the same, exactly and without an SVD (spec F6).

    Parameters
    ----------
    model
        A ``PeftModel``, or a model into which an adapter was injected.
    directory
        New, empty, or left by an export that was interrupted.
    adapter_name
        Which adapter; may be left out when the model has one.
    dtype, compact, for_server
        As for `hora_spec.export_lora`: dtype of the tensors, whether modules keep ranks and alphas of their own, and
        the server whose limits are checked.

    Raises
    ------
    HoraError
        If there is no such adapter, a value is not finite, a weight is adapted that LoRA cannot, or the server takes no
        such adapter.
    """
    name = adapter_name_of(model, adapter_name)
    for path, layer in model.named_modules():
        if isinstance(layer, HoraLayer) and name in layer.hora_attached:
            _check_one_group(path, layer.get_base_layer())
    write_lora(adapter_in(model, name), directory, dtype=dtype, compact=compact, for_server=for_server)


def _check_one_group(path: str, base: nn.Module) -> None:
    if getattr(base, "groups", 1) > 1:  # PEFT 0.21 has one A for all channels there, and cannot merge
        raise HoraError(
            f"LoRA has no convolution whose groups have one A in common, got {path!r}: merge the adapter (spec F6)"
        )


def adapter_name_of(model: nn.Module, adapter_name: str | None) -> str:
    """The named adapter of a model, or its only one."""
    names = sorted(
        {name for module in model.modules() if isinstance(module, HoraLayer) for name in module.hora_attached}
    )
    if adapter_name is None and len(names) == 1:
        return names[0]
    if adapter_name is None or adapter_name not in names:
        raise HoraError(f"adapter_name is one of {names}, got {adapter_name!r}: name an adapter of this model")
    return adapter_name


def rescaled(model: nn.Module, adapter_name: str) -> str:
    """Where an adapter acts at another scale than that of its training, and at which; empty if nowhere."""
    for path, layer in model.named_modules():
        if isinstance(layer, HoraLayer) and adapter_name in layer.hora_attached:
            trained, scaling = layer.hora_attached[adapter_name].scaling, layer.scaling[adapter_name]
            if scaling != trained:
                return f"{scaling / trained:g} times its scale in {path!r}"
    return ""


@contextmanager
def _onloaded(model: nn.Module, adapter_name: str) -> Generator[None, None, None]:
    """The hypernetworks of an adapter in memory, where accelerate offloads them."""
    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, HoraLayer) and adapter_name in layer.hora_hyper:
                for module in layer.hora_hyper[adapter_name].modules():
                    stack.enter_context(align_module_device(module))
        yield


def _numpy(name: str, tensor: torch.Tensor) -> Any:
    if tensor.is_meta:
        raise HoraError(f"the tensors of an adapter are in memory, {name} is offloaded: load it without offloading")
    if is_sharded(tensor):
        raise HoraError(f"the tensors of an adapter are whole, {name} is sharded: gather the state dict first")
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
