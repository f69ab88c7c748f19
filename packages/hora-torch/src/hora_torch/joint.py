"""The joint start of A on a model: what the loss wants all heads to read, measured through the adapter (spec I7).

With A at zero and B at probes P, or the other way round, the delta is zero and the gradient of the other factor is a
product with the gradient G of the weight: ``P^T G`` or ``G Q^T``. So nothing dense is formed, and whatever an adapter
can be trained on can be measured: fused, quantised and sharded weights, any attention.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from hora_spec import Factors, HoraError, JointStart, LayerShape, Measure, Moments, joint_start
from hora_spec.joint import Probes, Scale, Source
from torch import Tensor, nn

from hora_torch.export import adapter_name_of, rescaled
from hora_torch.hypernet import HoraHypernet
from hora_torch.layer import HoraLayer
from hora_torch.sharding import placed_like

Loss = Callable[[nn.Module, Any], Tensor]


def joint_a(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    adapter_name: str | None = None,
    of: Source = "gradient",
    scale: Scale = "kaiming",
    together: bool = False,
    power: int = 1,
    oversample: int = 8,
) -> JointStart:
    """Start the A of every adapted layer where a few batches say that the heads should read, before training.

    Call it once, after `get_peft_model` and before the optimiser is made. It takes ``2 * power + 2`` passes forward and
    backward over the batches and one forward, or ``power + 3`` forward alone with ``of="inputs"``, in evaluation mode.
    A new classification head that starts at zero has no gradient to pass on: fit it on frozen features first.

    Parameters
    ----------
    model
        A ``PeftModel`` whose adapter shares a free or fixed A: ``HoraConfig(**PRESETS["joint"].fields)``.
    batches
        All of them are kept for the passes, so a handful; each counts equally.
    loss
        ``loss(model, batch) -> scalar``, a mean; by default ``model(**batch).loss``.
    adapter_name
        Of the adapter, if there are several; it must be active.
    of, scale, together, power, oversample
        As in `hora_spec.joint_start`.

    Returns
    -------
    JointStart
        The written values and the singular values.

    Raises
    ------
    HoraError
        If the adapter was trained already, has no such A, or what is measured has too few directions (spec I7).
        Nothing has changed then.

    Notes
    -----
    In several processes the batches of all of them count, and each gets the same A from batches of its own, of which
    processes may have different numbers where parameters are not sharded.

    Examples
    --------
    >>> import torch, peft, hora_torch
    >>> config = hora_torch.HoraConfig(r=2, sharing="a", a_source="fixed", target_modules=["0"], num_heads=2)
    >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    >>> start = hora_torch.joint_a(model, [torch.randn(8, 4)], lambda model, x: model(x).square().mean())
    >>> start.params["."]["a._0"].shape
    (2, 4)
    """
    name = adapter_name_of(model, adapter_name)
    layers = [module for module in model.modules() if isinstance(module, HoraLayer) and name in module.hora_attached]
    hypernets = {leader: leader.hora_hyper[name] for leader in layers if name in leader.hora_hyper}
    _check_untrained(model, hypernets.values(), layers, name)
    batches = list(batches)
    if not batches:
        raise HoraError("a joint start is that of some batches, got none (spec I7)")

    trial = _Trial(model, name, layers, hypernets, batches, loss or _loss_of_model)
    with _evaluating(model):
        start = joint_start(
            {hypernet.name: (hypernet.spec, hypernet.layer) for hypernet in hypernets.values()},
            Measure(trial.left, trial.right, trial.inputs),
            of=of,
            scale=scale,
            together=together,
            power=power,
            oversample=oversample,
            seed=next(iter(hypernets.values())).seed,
        )
    with torch.no_grad():
        for hypernet in hypernets.values():
            params = hypernet.params()
            for key, value in start.params[hypernet.name].items():
                params[key].copy_(placed_like(torch.from_numpy(value), params[key]))
    return start


class _Probe(nn.Module):
    """Stands in the place of a hypernetwork and hands out given factors, whose delta is unscaled."""

    def __init__(self, layer: LayerShape, scaling: float, factors: Mapping[str, Factors]) -> None:
        super().__init__()
        self.layer, self.gain, self.factors = layer, 1 / scaling, factors

    def registered(self) -> None:
        """Nothing is kept for it."""

    def forward(self, projections: Iterable[str] | None = None, *, gained: bool = True) -> dict[str, Factors]:
        return {p: self.factors[p] for p in (self.layer if projections is None else projections)}


class _Trial:
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
                layer = self.hypernets[attached.leader or module].name
                bases = {p: _tensor(probes[layer][p], module) for p in attached.sites}
                stack.enter_context(_watched(module, bases, {p: sums.setdefault((layer, p), []) for p in bases}))
            for batch in self.batches:
                self.loss(self.model, batch)
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
                    leaves[hypernet.name, p], given[p] = factors(hypernet, p, _tensor(probe, leader))
                probe = _Probe(hypernet.layer, leader.scaling[self.name], given)
                stack.enter_context(_in_place_of(leader, self.name, probe))
            sums = {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}
            count = _over_processes(torch.tensor(float(len(self.batches)), device=next(iter(leaves.values())).device))
            for batch in self.batches:
                with torch.enable_grad():
                    value = self.loss(self.model, batch)
                grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
                for key, grad in zip(sums, grads, strict=True):
                    sums[key] += 0 if grad is None else grad
        result: Probes = {}
        for (layer, p), total in sums.items():
            result.setdefault(layer, {})[p] = (_over_processes(total) / count).cpu().double().numpy()
        return result


def _loss_of_model(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping) or getattr(output := model(**batch), "loss", None) is None:
        raise HoraError(
            f"without a loss function, model(**batch).loss is taken, got a batch of type {type(batch).__name__} and no "
            "such loss: pass loss=lambda model, batch: ... (spec I7)"
        )
    return output.loss


def _check_untrained(
    model: nn.Module, hypernets: Iterable[HoraHypernet], layers: Sequence[HoraLayer], name: str
) -> None:
    for hypernet in hypernets:
        if any(bool(param.any()) for key, param in hypernet.params().items() if key.startswith(("b.", "b_out."))):
            raise HoraError(f"A starts before training, got a delta of {hypernet.name!r} that is not zero (spec I7)")
    if any(name not in layer.active_adapters or layer.disable_adapters or layer.merged for layer in layers):
        raise HoraError(
            f"what is measured goes through the adapter, {name!r} is not active, disabled or merged: "
            f"set_adapter({name!r}) first (spec I7)"
        )
    if scale := rescaled(model, name):
        raise HoraError(f"what is measured goes through the adapter, {name!r} acts at {scale}: unscale it (spec I7)")


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None, None, None]:
    """Every pass must see the same function, so nothing is dropped."""
    modes = {module: module.training for module in model.modules()}
    try:
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
    module: HoraLayer, bases: Mapping[str, Tensor], sums: Mapping[str, list[Tensor]]
) -> Generator[None, None, None]:
    """Add ``Q x x^T``, ``x^T x`` and the number of tokens of every call of a module to `sums`."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for p, basis in bases.items():
            x = module.input_of(p, args, kwargs).to(basis.dtype)
            terms = (x @ basis.mT).mT @ x, x.square().sum(), x.new_tensor(float(len(x)))
            sums[p][:] = [*map(torch.add, sums[p], terms)] if sums[p] else terms

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _tensor(array: np.ndarray, module: HoraLayer) -> Tensor:
    """In float32, where the module computes."""
    device = next(iter(module.get_base_layer().parameters())).device
    return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(device)


def _over_processes(tensor: Tensor) -> Tensor:
    """Sum over the processes of a launch."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor
