"""Passes over batches with probes in the place of hypernetworks: what `joint_a` measures on a model.

All passes must see one function, which each checks by the loss: at a delta of zero it has one value.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import numpy as np
import torch
from hora_spec import Factors, HoraError, Moments
from hora_spec.joint import LOSS_SCALE, Probes
from torch import Tensor, nn

from hora_torch.hypernet import HoraHypernet
from hora_torch.layer import HoraLayer

Loss = Callable[[nn.Module, Any], Tensor]


class _Probe(nn.Module):
    """Stands in the place of a hypernetwork and hands out given factors, whose delta is unscaled."""

    def __init__(self, scaling: float, factors: Mapping[str, Factors]) -> None:
        super().__init__()
        self.gain, self.factors = 1 / scaling, factors

    def registered(self) -> None:
        """Nothing is kept for it."""

    def forward(self, projections: Iterable[str], *, gained: bool) -> dict[str, Factors]:
        return {p: self.factors[p] for p in projections}


class Trial:
    """Passes over the batches with probes in the place of the hypernetworks."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        layers: Sequence[HoraLayer],
        hypernets: Mapping[HoraLayer, HoraHypernet],
        batches: Sequence[Any],
        loss: Loss,
    ) -> None:
        self.model, self.name, self.layers, self.hypernets = model, name, layers, hypernets
        self.batches, self.loss = batches, loss
        self.scale = LOSS_SCALE
        self.values: dict[int, float] = {}

    def left(self, probes: Probes) -> Probes:
        """``P^T G``: gradients of A where B is P and A zero."""

        def factors(hypernet: HoraHypernet, p: str, rows: Tensor) -> tuple[Tensor, Factors]:
            shape = hypernet.layer[p]
            a = rows.new_zeros(rows.shape[1], shape.embed_dim).requires_grad_()
            return a, Factors(a, rows.unflatten(0, (shape.num_heads, shape.head_dim)))

        return self._gradients(probes, factors)

    def right(self, probes: Probes) -> Probes:
        """``G Q^T``: gradients of B where A is Q and B zero."""

        def factors(hypernet: HoraHypernet, p: str, basis: Tensor) -> tuple[Tensor, Factors]:
            shape = hypernet.layer[p]
            b = basis.new_zeros(shape.num_heads, shape.head_dim, len(basis)).requires_grad_()
            return b, Factors(basis, b)

        found = self._gradients(probes, factors)
        return {layer: {p: grad.reshape(-1, grad.shape[-1]) for p, grad in own.items()} for layer, own in found.items()}

    def inputs(self, probes: Probes) -> dict[str, dict[str, Moments]]:
        """``Q E[x x^T]`` and ``E[x^T x]`` of what the adapted modules are given."""
        sums: dict[tuple[str, str], list[Tensor]] = {}
        with ExitStack() as stack, torch.no_grad():
            for module in self.layers:
                attached = module.hora_attached[self.name]
                hypernet = self.hypernets[attached.leader or module]
                layer = hypernet.name
                bases = {p: _tensor(probes[layer][p], module, hypernet) for p in attached.sites}
                own = {p: sums.setdefault((layer, p), []) for p in bases}
                stack.enter_context(_watched(module, bases, own, lambda: mask))
            for index, batch in enumerate(self.batches):
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                self._value(index)
        found: dict[str, dict[str, Moments]] = {}
        for (layer, p), parts in sums.items():
            if not parts:
                raise HoraError(
                    f"the loss calls every adapted layer, got none of {p!r} of {layer!r}: leave it out (spec I7)"
                )
            probed, square, count = (_over_processes(part).cpu().double().numpy() for part in parts)
            found.setdefault(layer, {})[p] = Moments(probed / count, float(square / count))
        return found

    def _gradients(
        self, probes: Probes, factors: Callable[[HoraHypernet, str, Tensor], tuple[Tensor, Factors]]
    ) -> Probes:
        leaves: dict[tuple[str, str], Tensor] = {}
        with ExitStack() as stack:
            for leader, hypernet in self.hypernets.items():
                given = {}
                for p, probe in probes[hypernet.name].items():
                    leaves[hypernet.name, p], given[p] = factors(hypernet, p, _tensor(probe, leader, hypernet))
                probe = _Probe(leader.scaling[self.name], given)
                stack.enter_context(_in_place_of(leader, self.name, probe))
            sums = self._summed(leaves)
        count = _over_processes(torch.tensor(float(len(self.batches)), device=next(iter(sums.values())).device))
        result: Probes = {}
        for (layer, p), total in sums.items():
            result.setdefault(layer, {})[p] = (_over_processes(total) / count).cpu().double().numpy()
        return result

    def _summed(self, leaves: Mapping[tuple[str, str], Tensor]) -> dict[tuple[str, str], Tensor]:
        """Gradients of the batches' losses, of which no product leaves float16's range, in one sum."""
        while True:
            sums = {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}
            for index in range(len(self.batches)):
                with torch.enable_grad():
                    value = _differentiable(self._value(index)) * self.scale
                grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
                for key, grad in zip(sums, grads, strict=True):
                    sums[key] += 0 if grad is None else grad / self.scale
            overflows = float(not all(bool(torch.isfinite(total).all()) for total in sums.values()))
            if self.scale == 1 or not _over_processes(next(iter(sums.values())).new_tensor(overflows)):
                return sums
            self.scale = max(1.0, self.scale / 16)

    def _value(self, index: int) -> Any:
        """The loss of a batch, which is the same function in every pass.

        It draws from torch's generators what it drew the last time; what it takes out of a batch is there again.
        """
        torch.manual_seed(index)
        batch = self.batches[index]
        value = self.loss(self.model, copy(batch) if isinstance(batch, MutableMapping | MutableSequence) else batch)
        if isinstance(value, Tensor) and value.numel() == 1:
            number = float(value.detach())
            before = self.values.setdefault(index, number)
            if abs(number - before) > self._rounding() * abs(before):
                raise HoraError(
                    f"all passes see one function, got a loss of {before:g} and then {number:g} for batch {index}: "
                    "give batches that stay as they are and a loss without dropout or draws of its own (spec I7)"
                )
        return value

    def _rounding(self) -> float:
        """How far a loss may be off when it is computed again, relatively: devices may add up in another order."""
        kinds = {param.dtype for param in self.model.parameters() if param.is_floating_point()}
        return max([1e-4, *(8 * torch.finfo(kind).eps for kind in kinds)])


def _differentiable(value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad:
        return value
    kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.numel() != 1 else "no gradient"
    raise HoraError(
        f"a loss is one number that can be differentiated, got {kind}: return a mean, not detached nor under no_grad "
        "(spec I7)"
    )


@contextmanager
def unchanged(model: nn.Module) -> Generator[None, None, None]:
    """Evaluation mode, in which nothing is dropped; afterwards modes and random generators are what they were."""
    modes = {module: module.training for module in model.modules()}
    devices = {param.device for param in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    kind = next((device.type for device in devices), "cuda")
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _in_place_of(leader: HoraLayer, name: str, probe: nn.Module) -> Generator[None, None, None]:
    hypernet = leader.hora_hyper[name]
    try:
        leader.hora_hyper[name] = probe
        yield
    finally:
        leader.hora_hyper[name] = hypernet


@contextmanager
def _watched(
    module: HoraLayer,
    bases: Mapping[str, Tensor],
    sums: Mapping[str, list[Tensor]],
    present_mask: Callable[[], Any],
) -> Generator[None, None, None]:
    """Add ``Q x x^T``, ``x^T x`` and the number of tokens of every call of a module to `sums`."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for p, basis in bases.items():
            x = _tokens(module.input_of(p, args, kwargs), present_mask()).to(basis.dtype)
            terms = (x @ basis.mT).mT @ x, x.square().sum(), x.new_tensor(float(len(x)))
            sums[p][:] = [*map(torch.add, sums[p], terms)] if sums[p] else terms

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _tokens(x: Tensor, mask: Any) -> Tensor:
    """Rows of the inputs ``(..., embed)``, without those that a mask of their shape leaves out: padding."""
    if isinstance(mask, Tensor) and mask.shape == x.shape[:-1]:
        return x[mask.bool().to(x.device)]
    return x.flatten(0, -2)


def _tensor(array: np.ndarray, module: HoraLayer, hypernet: HoraHypernet) -> Tensor:
    """In float32, where the module computes; an offloaded weight does not tell, the adapter beside it does."""
    held = (*module.get_base_layer().parameters(), *hypernet.params().values())
    device = next(tensor.device for tensor in held if not tensor.is_meta)
    return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(device)


def _over_processes(tensor: Tensor) -> Tensor:
    """Sum over the processes of a launch."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor
