"""The joint start of A on a model: what the loss wants all heads to read, measured through the adapter (spec I7).

With A at zero and B at probes P, or the other way round, the delta is zero and the gradient of the other factor is a
product with the gradient G of the weight: ``P^T G`` or ``G Q^T``. So nothing dense is formed, and whatever an adapter
can be trained on can be measured: fused, quantised and sharded weights, any attention.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from hora_spec import HoraError, JointStart, Measure, joint_start
from hora_spec.joint import Scale, Source, few
from torch import Tensor, nn

from hora_torch.export import adapter_name_of, rescaled
from hora_torch.hypernet import HoraHypernet
from hora_torch.layer import HoraLayer
from hora_torch.sharding import placed_like
from hora_torch.trials import Loss, Trial, unchanged


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
        All of them are kept for the passes, so a handful, at most 256; each counts equally. Tokens that the
        ``attention_mask`` of a mapping leaves out are no inputs.
    loss
        ``loss(model, batch) -> scalar``, a mean; by default ``model(**batch).loss``. It gets a shallow copy of a
        batch that is a mapping or a list, and draws the same from torch's generators in every pass.
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
        If the adapter was trained already, has no such A, the loss cannot be differentiated or takes another value in
        another pass, or what is measured has too few directions (spec I7). Nothing has changed then.

    Notes
    -----
    Modes, random generators and gradients are afterwards what they were. While it measures, the loss is multiplied by
    a power of two, so that gradients in float16 do not vanish.

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
    trial = Trial(model, name, layers, hypernets, few(batches), loss or _loss_of_model)
    with unchanged(model):
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
        if any(param.is_meta for param in hypernet.params().values()):
            raise HoraError(
                f"A starts where its values are, those of {hypernet.name!r} are not here: start it before the model is "
                "offloaded (spec I7)"
            )
        if any(bool(param.any()) for key, param in hypernet.params().items() if key.startswith(("b.", "b_out."))):
            raise HoraError(f"A starts before training, got a delta of {hypernet.name!r} that is not zero (spec I7)")
    if any(name not in layer.active_adapters or layer.disable_adapters or layer.merged for layer in layers):
        raise HoraError(
            f"what is measured goes through the adapter, {name!r} is not active, disabled or merged: "
            f"set_adapter({name!r}) first (spec I7)"
        )
    if scale := rescaled(model, name):
        raise HoraError(f"what is measured goes through the adapter, {name!r} acts at {scale}: unscale it (spec I7)")
