"""An adapted module: its base layer, the branches of its adapters, merging."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from hora_spec import Factors, HoraError, Site
from hora_spec.layout import Span
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from hora_torch.config import HoraConfig
from hora_torch.functional import stacked
from hora_torch.hypernet import HoraHypernet
from hora_torch.lifetime import handed, kept
from hora_torch.linear import Branch
from hora_torch.merging import Addition, merged_weight, on_all_rows
from hora_torch.planning import LayerPlan
from hora_torch.quantized import Rounding, backend_of
from hora_torch.stored import Replaced, Stored, stored_weight
from hora_torch.targets import device_of, out_in

BASE = "__base__"
"""PEFT's name for the base model in ``adapter_names``."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """What one adapter adds to one module. The leader owns the layer's hypernetwork; None is the module itself.

    ``scaling`` is that of the method (spec D1); `HoraLayer.scaling` is what acts at the moment.
    """

    sites: Mapping[str, Site]
    scaling: float
    dropout: float
    route: str
    leader: "HoraLayer | None"
    rows: Mapping[str, Span] = field(init=False)

    def __post_init__(self) -> None:
        rows = {p: site.layout.rows(site.weight_shape) for p, site in self.sites.items()}
        object.__setattr__(self, "rows", rows)


class HoraLayer(BaseTunerLayer):
    """State that all adapted modules share; one entry per adapter.

    The hypernetwork of an attention layer is registered in the first of its targets, the leader, under
    ``hora_hyper``. The other targets hold a plain reference to the leader, so every tensor exists and is saved once.
    """

    adapter_layer_names = ("hora_hyper",)
    other_param_names = ("hora_attached", "_scaling")
    cast_input_dtype_enabled = True  # PEFT's helper turns it off for a while; inputs are never cast, factors are

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.hora_hyper = nn.ModuleDict()
        self.hora_attached: dict[str, Attachment] = {}
        self._scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.requantizing: Mapping[str, Any] = {}
        self._replaced = Replaced()

    def update_layer(
        self,
        adapter_name: str,
        plan: LayerPlan,
        sites: Mapping[str, Site],
        leader: "HoraLayer | None",
        config: HoraConfig,
    ) -> None:
        """Attach an adapter; without a leader this module becomes the leader and owns the hypernetwork."""
        if leader is None:
            hypernet = HoraHypernet(plan.spec, plan.shape, name=plan.name, seed=config.seed)
            if not config.init_weights:
                hypernet.randomize()
            self.hora_hyper[adapter_name] = hypernet
        self.hora_attached[adapter_name] = Attachment(
            sites, plan.spec.scaling, config.hora_dropout, config.route, leader
        )
        self._scaling[adapter_name] = plan.spec.scaling
        self._move_adapter_to_device_of_base_layer(adapter_name)

    @property
    def in_features(self) -> int:
        """Input width of the base layer."""
        return out_in(self.get_base_layer())[1]

    @property
    def out_features(self) -> int:
        """Output width of the base layer."""
        return out_in(self.get_base_layer())[0]

    @property
    def quantization_backend(self) -> QuantizationBackend | None:
        """How PEFT reads and writes the base's weight where that is made of codes."""
        return backend_of(self.get_base_layer(), self.requantizing)

    @property
    def rounding(self) -> Mapping[str, Rounding]:
        """What was lost where merged weights, by their names, were rounded to codes."""
        return self._replaced.rounding

    def stored(self, parameter: str) -> Stored:
        """The place of a base weight, if a sum can be written into it; otherwise a HoraError."""
        return stored_weight(self.get_base_layer(), parameter, self.quantization_backend)

    @property
    def scaling(self) -> Mapping[str, float]:
        """Factor of each adapter's delta at the moment, to be changed as a whole, or by `set_scale` and its like.

        It holds for this process: files, exports and copies into other adapters are of the adapter as it was trained.
        """
        return MappingProxyType(self._scaling)

    @scaling.setter
    def scaling(self, values: Mapping[str, float]) -> None:
        changed = [name for name, value in values.items() if self._scaling.get(name, value) != value]
        if merged := [name for name in changed if name in self.merged_adapters]:
            raise HoraError(
                f"the scale of an adapter is changed while it is not merged, {merged} are: call unmerge_adapter first, "
                "or the change would not be seen"
            )
        for name in changed:
            if not math.isfinite(values[name]):
                raise HoraError(f"a scale is a finite number, got {values[name]!r} for {name!r}")
        self._scaling.update({name: float(values[name]) for name in changed})

    def set_scale(self, adapter: str, scale: float) -> None:
        """Let an adapter act `scale` times as strongly as it was trained; nothing if it is not in this module."""
        if adapter in self._scaling:
            self.scaling = {adapter: scale * self.hora_attached[adapter].scaling}

    def scale_layer(self, scale: float) -> None:
        """Multiply the present scaling of all active adapters."""
        self.scaling = {name: self._scaling[name] * scale for name in self._present()}

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the present scaling of all active adapters, or go back to that of training."""
        self.scaling = {
            name: self.hora_attached[name].scaling if scale is None else self._scaling[name] / scale
            for name in self._present()
        }

    def _present(self) -> list[str]:
        return [name for name in self.active_adapters if name in self._scaling]

    def hypernet(self, adapter_name: str) -> HoraHypernet:
        """The hypernetwork that generates this module's factors."""
        leader = self.hora_attached[adapter_name].leader
        if leader is not None and "_is_replica" in self.__dict__:
            raise HoraError(
                "nn.DataParallel copies modules, not what they know of each other, and the projections of a layer "
                "share a hypernetwork: start one process per device (torchrun, accelerate launch), or show one device "
                "alone (CUDA_VISIBLE_DEVICES=0)"
            )
        return (self if leader is None else leader).hora_hyper[adapter_name]

    def _branches_of(self, adapter_name: str, keep_rate: float) -> dict[str, Branch]:
        """Branches of one adapter by projection, on inputs of which `keep_rate` survive dropout.

        From one generation for the whole layer where a call of the model or a scope is open.
        """
        attached, hypernet = self.hora_attached[adapter_name], self.hypernet(adapter_name)
        scaling = self._scaling[adapter_name] * hypernet.gain / keep_rate
        if (store := kept(hypernet)) is not None:
            if (self, scaling) not in store:
                store[self, scaling] = _branches(attached, store[hypernet], scaling)
            return store[self, scaling]
        factors = handed(hypernet, attached.sites) or hypernet(attached.sites, gained=False)
        return _branches(attached, factors, scaling)

    def get_delta_weight(self, adapter_name: str) -> Tensor | dict[str, Tensor]:
        """Dense update in the stored form of the weight, zero outside the adapted windows.

        A module with several adapted parameters returns one tensor per parameter name.
        """
        shapes = {site.parameter: site.weight_shape for site in self.hora_attached[adapter_name].sites.values()}
        deltas = {}
        with torch.no_grad():
            for parameter, additions in self._additions([adapter_name]).items():
                _, a, *_ = additions[0]
                deltas[parameter] = merged_weight(a.new_zeros(shapes[parameter]), additions)
        return next(iter(deltas.values())) if len(deltas) == 1 else deltas

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base weight by ``W + delta`` of the named, by default the active, adapters.

        The sum is computed in float32 from the unmerged weight and rounded once; the unmerged weight is kept. Of a
        distributed weight each process merges its own part. A sum of codes is rounded to codes again, with a warning
        that says what is lost (`rounding`).

        Raises
        ------
        HoraError
            If the result is not finite (`safe_merge` checks every entry), the base is computed or made of codes that
            cannot be written, or `safe_merge` finds that rounding to codes loses more than half of the update. Nothing
            has changed then.
        """
        if self.merge_silently(safe_merge, adapter_names):
            warn_of_rounding({type(self.get_base_layer()).__name__: self}, stacklevel=3)

    def merge_silently(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> bool:
        """As `merge`; whether anything was lost by rounding to codes."""
        names = self.active_adapters if adapter_names is None else adapter_names
        if not isinstance(names, str):  # PEFT's check refuses one
            names = [name for name in names if name in self.hora_attached]
        if not names or not (names := check_adapters_to_merge(self, names)):
            return False
        with torch.no_grad():
            additions = self._additions([*self.merged_adapters, *names])
            self._replaced.replace(self._places(additions), additions, check=safe_merge, name=names[0])
        self.merged_adapters.extend(names)
        return any(rounding.delta for rounding in self.rounding.values())

    def check_unmergeable(self) -> None:
        """Raise HoraError if somebody else wrote to a merged weight, which unmerging would lose (spec M2)."""
        self._replaced.check(self._places(self._replaced.originals))

    def unmerge(self) -> None:
        """Restore the base weight, bit for bit.

        Raises
        ------
        HoraError
            If somebody else wrote to the merged weight, which would be lost. Nothing has changed then.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with torch.no_grad():
            self._replaced.restore(self._places(self._replaced.originals))
        self.merged_adapters.clear()

    def _places(self, parameters: Iterable[str]) -> dict[str, Stored]:
        return {parameter: self.stored(parameter) for parameter in parameters}

    def enable_adapters(self, enabled: bool) -> None:
        """Turn adapters on or off; merged ones leave the weight at once, since others may read it past this module."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def restore_merged(self, names: Sequence[str]) -> None:
        """Go back to the state in which exactly the adapters `names` were merged."""
        if list(names) == self.merged_adapters:
            return
        self.unmerge()
        if names:
            self.merge_silently(adapter_names=list(names))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """A HoRA delta has low rank; `hora_torch.export_lora` converts without loss."""
        return True

    def _additions(self, adapter_names: Sequence[str]) -> dict[str, list[Addition]]:
        """What adapters add to each stored weight, from factors that are generated now."""
        additions: dict[str, list[Addition]] = {}
        for name in adapter_names:
            attached, hypernet = self.hora_attached[name], self.hypernet(name)
            factors = hypernet(attached.sites, gained=False)
            for p, site in attached.sites.items():
                addition = site.layout, *stacked(factors[p]), self._scaling[name] * hypernet.gain
                additions.setdefault(site.parameter, []).append(addition)
        return additions

    def _working(self) -> list[str]:
        """Active adapters that touch this module and are not merged or disabled."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.hora_attached]

    def _drops(self, adapter_name: str) -> float:
        return self.hora_attached[adapter_name].dropout if self.training else 0.0

    def _check_mixed(self, batch: int, adapter_names: Sequence[str]) -> None:
        if batch != len(adapter_names):
            raise HoraError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {batch} respectively: give one name per sample"
            )
        if self.merged:
            raise HoraError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _get_available_adapters(self) -> set[str]:
        return set(self.hora_attached)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Device alone: parameters stay float32, since rounding them to a bf16 base would change the start."""
        if adapter_name not in self.hora_hyper:
            return
        hypernet, base = self.hora_hyper[adapter_name], self.get_base_layer()
        target = device or device_of(base)
        if target.type == "meta":  # offloaded: where accelerate runs it
            target = getattr(getattr(base, "_hf_hook", None), "execution_device", None) or "cpu"
        if not any(param.is_meta for param in hypernet.params().values()):
            hypernet.to(target)


def warn_of_rounding(layers: Mapping[str, HoraLayer], *, stacklevel: int) -> None:
    """Say what merging into codes lost, with the numbers of the layer that lost most."""
    found = [(rounding, name) for name, layer in layers.items() for rounding in layer.rounding.values()]
    if found:
        worst, name = max(found, key=lambda entry: entry[0].delta)
        warnings.warn(
            f"a merge into quantised weights is rounded to their codes, which loses up to {worst} ({name}); unmerging "
            "restores the codes",
            stacklevel=stacklevel,
        )


def _branches(attached: Attachment, factors: Mapping[str, Factors], scaling: float) -> dict[str, Branch]:
    return {p: _branch(*stacked(factors[p]), scaling, rows) for p, rows in attached.rows.items()}


def _branch(a: Tensor, b: Tensor, scaling: float, rows: Span) -> Branch:
    """Rows in several blocks become all rows, with zeros where others are: one product writes each once."""
    if rows.blocks == 1:
        return Branch(a, b, scaling, rows.start, rows.stop)
    return Branch(a, on_all_rows(b, rows), scaling, 0, rows.size)
