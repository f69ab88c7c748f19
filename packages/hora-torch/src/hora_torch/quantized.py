"""Weights that are kept as codes: read and written through PEFT's backends, tried before use, restored bit for bit.

The codes of the unmerged weight are kept, not the delta: what is requantised is not what it was, and a delta that is
subtracted again does not bring it back. Nothing is written before the requantised weight was computed and tried, and no
weight stays in memory as floats.
"""

import copy
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from hora_spec import HoraError
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn

from hora_torch.merging import Addition, merged_weight

_PARTS = {
    "bnb 8bit": ("weight", "state"),
    "bnb 4bit": ("weight", "quant_state"),
    "hqq": ("W_q", "meta"),
    "torchao": ("weight",),
    "quanto": ("weight",),
}
"""Attributes of a linear map that make up its weight, by the name of the backend; the first holds the codes."""

_WAY_OUT = "load the base in its full dtype to merge, or serve the adapter as LoRA with hora_torch.export_lora"


class Rounding(NamedTuple):
    """What is lost where ``W + delta`` is rounded to codes: its norm relative to that of the weight and of the delta.

    A `delta` of 1 means that the merged weight is no closer to the sum than the weight without the adapter.
    """

    weight: float
    delta: float

    def __str__(self) -> str:
        return f"{self.delta:.0%} of the update and {self.weight:.2g} of the weight"


def backend_of(base: nn.Module, options: Mapping[str, Any]) -> QuantizationBackend | None:
    """How to read and write the codes of a linear map; None where its weight is no known code.

    Parameters
    ----------
    base
        The module beneath adapters.
    options
        What PEFT takes from the model to requantise (``peft.utils.get_quantization_kwargs``).
    """
    weight = base._parameters.get("weight")
    known = type(base).__module__.startswith(("torch.nn.", "transformers.pytorch_utils"))
    if known and type(weight) in (nn.Parameter, type(None)):
        return None  # PEFT's answer too, which imports every library that is installed
    kinds = {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(weight).__mro__}
    if "optimum.QTensor" in kinds:
        return _Quanto()
    if "torchao.TorchAOBaseTensor" in kinds and not options:
        return _Torchao()
    return resolve_quantization_backend(base, **options)


class CodedWeight:
    """The weight of a quantised linear map; its value is the parts that hold it, by their name."""

    def __init__(self, module: nn.Module, backend: QuantizationBackend) -> None:
        self.module, self.backend = module, backend
        if not backend.supports_merge or backend.backend_name not in _PARTS:
            raise HoraError(f"only codes that can be read and written are merged into, not {self._kind()}: {_WAY_OUT}")
        if self._codes(module).is_meta:
            raise HoraError(
                f"only a weight that is here can be merged into, {self._kind()} are offloaded: load the base without "
                "offloading (spec M1)"
            )

    def value(self) -> dict[str, Any]:
        """The parts themselves, which writing replaces."""
        return {name: getattr(self.module, name) for name in _PARTS[self.backend.backend_name]}

    def plus(
        self, value: Mapping[str, Any], additions: Sequence[Addition], *, check: bool, name: str
    ) -> tuple[dict[str, Any], Rounding]:
        """The codes of the sum, and what rounding lost; `check` refuses to lose more than half of the update.

        Raises
        ------
        HoraError
            If the codes cannot be read or requantised, or what was written is not what the module then computes with.
        """
        twin = self._twin(value)
        before = self._floats(twin)
        merged = merged_weight(before, additions, check=check, name=name)
        change = float((merged.float() - before.float()).norm())
        if not change:
            return dict(value), Rounding(0.0, 0.0)
        holder = _Holder(twin)
        try:
            self.backend.set_base_weight(holder, merged)
        except Exception as error:  # of whatever library
            raise HoraError(f"{self._kind()} cannot be requantised, {error}: {_WAY_OUT}") from error
        after = holder.base_layer
        _know_each_other(after, self._codes(after), None)
        if (made := _form(self._codes(after))) != (form := _form(self._codes(self._twin(value)))):
            raise HoraError(
                f"requantised codes are stored as before, {self._kind()} were {form}, got {made}: {_WAY_OUT}"
            )
        lost = float((self._floats(after).float() - merged.float()).norm())
        rounding = Rounding(lost / float(merged.float().norm()), lost / change)
        if check and not rounding.delta <= 0.5:
            raise HoraError(
                f"a safe merge keeps the update, rounding to {self._kind()} loses {rounding}: {_WAY_OUT}; without "
                "safe_merge it is merged nevertheless (spec M3)"
            )
        return {part: getattr(after, part) for part in value}, rounding

    def write(self, value: Mapping[str, Any]) -> None:
        """Put parts in their place, on the device of those that are there."""
        now, then = (self._codes_of(parts) for parts in (self.value(), value))
        dtype = now.dtype if now.is_floating_point() else None
        if now.device != then.device or (dtype or then.dtype) != then.dtype:
            twin = self._twin(value).to(now.device, dtype)
            value = {name: getattr(twin, name) for name in value}
        for name, part in value.items():
            setattr(self.module, name, part)
        _know_each_other(self.module, self._codes(self.module), self.module)

    def bits(self) -> Tensor:
        """The codes, without their scales, as the library stores them."""
        codes = self._codes(self._twin(self.value()))
        return max(_tensors(codes), key=lambda tensor: tensor.numel())

    def _kind(self) -> str:
        return f"the codes of {type(self.module).__name__} ({self.backend.backend_name})"

    def _codes(self, module: nn.Module) -> Tensor:
        return getattr(module, _PARTS[self.backend.backend_name][0])

    def _codes_of(self, parts: Mapping[str, Any]) -> Tensor:
        return parts[_PARTS[self.backend.backend_name][0]]

    def _twin(self, parts: Mapping[str, Any]) -> nn.Module:
        """A module that multiplies with `parts`, without bias or hooks, whose calls change nothing of the original."""
        twin = type(self.module).__new__(type(self.module))
        for name, value in vars(self.module).items():
            if name not in ("forward", "_old_forward", "_hf_hook"):
                vars(twin)[name] = copy.copy(value) if isinstance(value, dict) else value
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            vars(twin)[name] = type(vars(twin)[name])()
        twin.bias = None
        twin.training = True  # in evaluation bitsandbytes rounds inputs, and packs codes in an order of its own
        for name, part in parts.items():
            setattr(twin, name, _own(part))
        codes = self._codes(twin)
        _know_each_other(twin, codes, None)
        if getattr(getattr(codes, "quant_state", None), "packing_format_for_cpu", False):
            twin.state_dict()  # which brings packed codes back in order (bitsandbytes 0.50, AVX512-BF16)
        return twin

    def _floats(self, twin: nn.Module) -> Tensor:
        """What the codes of a twin stand for, shown to be what it multiplies with."""
        try:
            with torch.no_grad():
                floats = self.backend.get_base_weight(twin).detach()
                generator = torch.Generator().manual_seed(0)
                x = torch.randn(2, floats.shape[1], generator=generator).to(floats)
                expected, found = nn.functional.linear(x, floats).float(), twin(x).float()
        except Exception as error:  # of whatever library
            raise HoraError(f"{self._kind()} cannot be read, {error}: {_WAY_OUT}") from error
        if not bool((found - expected).norm() <= 0.1 * expected.norm()):
            raise HoraError(f"{self._kind()} are not what it multiplies with, or not finite: {_WAY_OUT}")
        return floats


class _Holder:
    """What PEFT's backends take for an adapted layer: they write into its base layer, or replace it."""

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer

    def get_base_layer(self) -> nn.Module:
        return self.base_layer


class _Quanto(QuantizationBackend):
    """optimum-quanto, which PEFT has no backend for: a weight is requantised by its module."""

    supports_merge = True
    backend_name = "quanto"
    layer_type = "linear"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        return base_layer.weight.dequantize()

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        base = peft_layer.get_base_layer()
        base.weight = nn.Parameter(weight_data)
        base.freeze()
        base.weight.requires_grad_(False)


class _Torchao(QuantizationBackend):
    """torchao without the config that PEFT asks for: a weight is requantised as its own attributes say."""

    supports_merge = True
    backend_name = "torchao"
    layer_type = "linear"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        return base_layer.weight.dequantize()

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        base = peft_layer.get_base_layer()
        weight = base.weight
        known = {name: getattr(weight, name) for name in _SAID_BY_TORCHAO if hasattr(weight, name)}
        known["granularity"] = _granularity(weight)
        known["float8_dtype"] = weight.qdata.dtype
        if (zero := getattr(weight, "zero_point", None)) is not None and bool((zero != 0).any()):
            known["mapping_type"] = _of_torchao("quant_primitives").MappingType.ASYMMETRIC
        asked = list(inspect.signature(type(weight).from_hp).parameters)[1:]
        made = type(weight).from_hp(weight_data, **{name: known[name] for name in asked if name in known})
        base.weight = nn.Parameter(made, requires_grad=False)


_SAID_BY_TORCHAO = (
    "block_size",
    "target_dtype",
    "act_quant_kwargs",
    "act_quant_scale",
    "act_quant_zero_point",
    "act_pre_scale",
    "activation_quantization",
    "activation_dtype",
    "kernel_preference",
    "mm_config",
    "reduce_range",
)
"""Attributes of torchao's tensors that their ``from_hp`` takes under the same name."""


def _granularity(weight: Any) -> Any:
    known, (rows, columns) = _of_torchao("granularity"), weight.block_size
    if (rows, columns) == tuple(weight.shape):
        return known.PerTensor()
    return known.PerRow() if columns == weight.shape[1] else known.PerGroup(columns)


def _of_torchao(module: str) -> Any:
    """A module of torchao, which is no dependency: whoever has a tensor of torchao has loaded it."""
    return sys.modules[f"torchao.quantization.{module}"]


def _know_each_other(module: nn.Module, codes: Tensor, owner: nn.Module | None) -> None:
    """In bitsandbytes a module knows the scales of its weight, and the weight its module; that of a twin does not, so
    that both are gone at once.
    """
    if hasattr(codes, "quant_state"):
        module.quant_state, codes.module = codes.quant_state, owner


def _own(part: Any) -> Any:
    """A part that calls of a twin may change: those of bitsandbytes move what they hold from place to place."""
    if type(part).__module__.startswith("bitsandbytes"):
        return copy.deepcopy(part)
    return copy.copy(part) if isinstance(part, dict) else part


def _tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of."""
    if type(tensor) is not Tensor and hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _tensors(getattr(tensor, name))
    else:
        yield tensor.data


def _form(codes: Tensor) -> tuple[Any, ...]:
    """Type, dtypes and shapes of what is stored."""
    return type(codes).__name__, tuple((tensor.dtype, tuple(tensor.shape)) for tensor in _tensors(codes))
