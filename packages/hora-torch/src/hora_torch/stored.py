"""Where a weight is kept: how its value is read, replaced, and brought back bit for bit (spec M2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from hora_spec import HoraError, Layout
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from hora_torch.merging import Addition, merged_weight, on_all_rows
from hora_torch.quantized import CodedWeight, Rounding
from hora_torch.sharding import is_sharded, part_of_weight


class Stored(Protocol):
    """A weight that adapters can be merged into; nobody writes into what `value` returns, so keeping it is enough."""

    def value(self) -> Any:
        """What `write` takes to bring the weight back to what it is now."""
        ...

    def plus(self, value: Any, additions: Sequence[Addition], *, check: bool, name: str) -> tuple[Any, Rounding | None]:
        """The value with every delta added, and what rounding it to codes lost."""
        ...

    def write(self, value: Any) -> None:
        """Make `value` the value of the weight, on the device and in the dtype that it has now."""
        ...

    def bits(self) -> Tensor:
        """The numbers that are stored, as they are stored."""
        ...


class Fingerprint(NamedTuple):
    """What tells whether a weight was written to: its type, and the sum of its bits, which costs one pass."""

    dtype: torch.dtype
    bits: int

    @classmethod
    def of(cls, stored: Stored) -> "Fingerprint":
        """Of a weight as it is now."""
        local = stored.bits()
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        return cls(local.dtype, int(local.contiguous().view(integers[local.element_size()]).sum()))


@dataclass(slots=True)
class Replaced:
    """Weights of one module that hold a sum now: what they held before, what was written, and what rounding lost."""

    originals: dict[str, Any] = field(default_factory=dict)
    written: dict[str, Fingerprint] = field(default_factory=dict)
    rounding: dict[str, Rounding] = field(default_factory=dict)

    def replace(
        self, places: Mapping[str, Stored], additions: Mapping[str, Sequence[Addition]], *, check: bool, name: str
    ) -> None:
        """Write the sum of the original and every delta into each place, once all sums are there."""
        sums = {}
        for parameter, place in places.items():
            original = self.originals[parameter] if parameter in self.originals else place.value()
            sums[parameter] = original, *place.plus(original, additions[parameter], check=check, name=name)
        for parameter, (original, value, rounding) in sums.items():
            self.originals[parameter] = original
            places[parameter].write(value)
            self.written[parameter] = Fingerprint.of(places[parameter])
            if rounding is not None:
                self.rounding[parameter] = rounding

    def check(self, places: Mapping[str, Stored]) -> None:
        """Raise HoraError where somebody else wrote since."""
        for parameter, place in places.items():
            found, written = Fingerprint.of(place), self.written[parameter]
            if found != written and found.dtype == written.dtype:
                raise HoraError(
                    f"a merged weight is unmerged as it was merged, {parameter} was written to since: unmerge in the "
                    "opposite order, or load the base again (spec M2)"
                )

    def restore(self, places: Mapping[str, Stored]) -> None:
        """Write what was there before, once all places are found unchanged."""
        self.check(places)
        for parameter, place in places.items():
            place.write(self.originals[parameter])
        self.originals.clear()
        self.written.clear()
        self.rounding.clear()


def stored_weight(module: nn.Module, parameter: str, backend: QuantizationBackend | None = None) -> Stored:
    """The weight ``module.parameter``, if a sum can be written into it.

    Raises
    ------
    HoraError
        If it is neither a plain parameter nor codes that can be read and written: writing into other weights fails, or
        is lost without an error.
    """
    if backend is not None and parameter == "weight":
        return CodedWeight(module, backend)
    return PlainWeight(module, parameter)


class PlainWeight:
    """A parameter of floats, whole or distributed; its value is the tensor of this process."""

    def __init__(self, module: nn.Module, parameter: str) -> None:
        stored = module._parameters.get(parameter)
        if stored is None or not (type(stored) is nn.Parameter or is_sharded(stored)):
            kind = type(getattr(module, parameter, None)).__name__
            raise HoraError(
                f"only a plain parameter or known codes can be merged into, got a {kind} as {parameter} of "
                f"{type(module).__name__}: load the base in its full dtype, or serve the adapter as LoRA with "
                "hora_torch.export_lora (spec M1)"
            )
        if stored.is_meta:
            raise HoraError(
                f"only a weight that is here can be merged into, {parameter} of {type(module).__name__} is offloaded: "
                "load the base without offloading (spec M1)"
            )
        self.param = stored

    def value(self) -> Tensor:
        """The tensor itself, which writing replaces; of a distributed weight a copy."""
        return self.param.data.to_local().clone() if is_sharded(self.param) else self.param.data

    def plus(self, value: Tensor, additions: Sequence[Addition], *, check: bool, name: str) -> tuple[Tensor, None]:
        """A new tensor; of a distributed weight the part of this process."""
        if is_sharded(self.param):
            additions = [_part(addition, self.param) for addition in additions]
        return merged_weight(value, additions, check=check, name=name), None

    def write(self, value: Tensor) -> None:
        """Replace the tensor of the parameter, without touching the one before unless that is distributed."""
        value = value.to(self.bits().device, self.param.dtype)
        if is_sharded(self.param):
            self.param.data.to_local().copy_(value)
            return
        self.param.data = value
        if self.param.data_ptr() != value.data_ptr():
            raise HoraError(
                f"a merged weight is written into its parameter, {type(self.param)} kept its own value (spec M1)"
            )

    def bits(self) -> Tensor:
        """The tensor of this process."""
        return self.param.data.to_local() if is_sharded(self.param) else self.param.data


def _part(addition: Addition, weight: Tensor) -> Addition:
    layout, a, b, scaling = addition
    b = on_all_rows(b, layout.rows(tuple(weight.shape)))
    return Layout(layout.pattern), *part_of_weight(a, b, weight, layout.row_axis), scaling
