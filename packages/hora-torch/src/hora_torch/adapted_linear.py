"""An adapted linear map: the base layer's output and the branches of the active adapters."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hora_spec import HoraError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hora_torch.layer import HoraLayer
from hora_torch.linear import Branch, add_branches, has_hooks, low_rank_linear
from hora_torch.mixed import add_by_sample
from hora_torch.sharding import check_rows_alone, is_sharded, of_this_process


class HoraLinear(nn.Module, HoraLayer):
    """``x W^T + bias + scaling * (x A^T) B^T`` for a Linear or Conv1D, or for parts of a fused one (spec D3)."""

    def __init__(self, base_layer: nn.Module) -> None:
        nn.Module.__init__(self)
        HoraLayer.__init__(self, base_layer)

    def input_of(self, projection: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """What a projection reads in a call with these arguments, (..., embed)."""
        return args[0] if args else kwargs["x"]

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """Output of the base layer with the active adapters, or with one adapter per sample."""
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed(x, adapter_names, *args, **kwargs)
        names, base = self._working(), self.base_layer
        if not names:
            return base(x, *args, **kwargs)
        if len(names) > 1:
            names.sort(key=self._drops)  # adapters without dropout share one pass
        plain = not args and not kwargs and is_plain(base)
        result: Tensor | None = None if plain else base(x, *args, **kwargs)
        for keep, branches in self._passes(x, names):
            if result is None:
                weight = base.weight.T if isinstance(base, Conv1D) else base.weight
                route = self.hora_attached[names[0]].route
                result = low_rank_linear(x, weight, base.bias, branches, keep=keep, route=route)
            else:
                result = self._add(result, x, branches, keep)
        return result

    def _add(self, result: Tensor, x: Tensor, branches: list[Branch], keep: Tensor | None = None) -> Tensor:
        """Branches on the output of the base layer; under tensor parallelism those of this process's rows."""
        base = self.get_base_layer()
        if not isinstance(result, Tensor):
            raise HoraError(
                f"a linear map returns one tensor, {type(base).__name__} returned a {type(result).__name__}: leave it "
                "out of target_modules"
            )
        if x.requires_grad and torch.is_grad_enabled() and not result.requires_grad:
            raise HoraError(
                f"an adapted map hands the gradient on to its input, {type(base).__name__} returned a result without "
                "one, so that layers below would be trained on wrong gradients: quantise weights alone, not "
                "activations; load a base of bitsandbytes anew that was evaluated on a CPU before it was adapted"
            )
        weight = getattr(base, "weight", None)
        if is_sharded(weight):
            if is_sharded(result) or is_sharded(x):
                raise HoraError(
                    f"{type(base).__name__} takes and returns local tensors when its weight is sharded, got a DTensor: "
                    "leave use_local_output of ColwiseParallel at True"
                )
            axis = int(isinstance(base, Conv1D))
            check_rows_alone(weight, axis, type(base).__name__)
            x, branches = of_this_process(x, branches, weight, axis, result.shape[-1])
        return add_branches(result, x, branches, keep=keep)

    def _passes(self, x: Tensor, names: Sequence[str]) -> list[tuple[Tensor | None, list[Branch]]]:
        """Branches that share a dropout mask: all without dropout, then one adapter at a time."""
        passes: list[tuple[Tensor | None, list[Branch]]] = []
        for name in names:
            rate = self._drops(name)
            branches = list(self._branches_of(name, 1 - rate).values())
            if rate:
                passes.append((torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - rate), branches))
            elif passes:
                passes[0][1].extend(branches)
            else:
                passes.append((None, branches))
        return passes

    def _mixed(self, x: Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        self._check_mixed(len(x), adapter_names)

        def add(name: str, result: Tensor, x: Tensor) -> Tensor:
            return self._add(result, x, list(self._branches_of(name, 1.0).values()))

        return add_by_sample(self.base_layer(x, *args, **kwargs), x, adapter_names, self.hora_attached, add)

    def __repr__(self) -> str:
        return "hora." + super().__repr__()


def is_plain(base: nn.Module) -> bool:
    """Whether calling `base` does nothing but ``x W^T + bias`` on plain tensors: no subclass, no hooks."""
    return type(base) in (nn.Linear, Conv1D) and type(base.weight) in (nn.Parameter, Tensor) and not has_hooks(base)
