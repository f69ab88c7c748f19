"""Parameter groups for an optimiser: the generator of A, that of B, and everything else that is trained."""

from collections.abc import Iterator
from typing import Any, Literal

from hora_spec import HoraError
from torch import nn

from hora_torch.layer import HoraLayer

_Part = Literal["A", "B", "B, residual", "other"]
_OF_A = ("a_seed", "a_in", "a_out", "a")


def param_groups(
    model: nn.Module, lr: float, *, ratio: float = 1.0, weight_decay: float = 0.0, residual_decay: float | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters in groups for any optimiser of torch, as LoRA+ has them (arXiv 2402.12354).

    Parameters
    ----------
    model
        A ``PeftModel``, or a model into which adapters were injected.
    lr
        Learning rate of A, or of its generator, and of what is trained beside the adapters.
    ratio
        Learning rate of B, or of its generator (``head_embed``, ``b_in``, ``b_out``), over `lr`.
    weight_decay
        For matrices. Vectors, biases and norms have none, nor have head embeddings that are normalised: their scale
        changes no factor, so that decay would only raise their learning rate (spec I4).
    residual_decay
        That of the free part beside a generated B, which it pulls towards what heads share (spec G6, G8); by default
        `weight_decay`.

    Returns
    -------
    list of dict
        ``params``, ``lr``, ``weight_decay`` and a ``name``: ``A``, ``B``, ``B, residual`` or ``other``, with ``,
        no decay``. Every trainable parameter is in one of them; none is empty.

    Raises
    ------
    HoraError
        If no adapter is trained, or a number is out of its domain.

    Examples
    --------
    >>> import torch, peft, hora_torch
    >>> config = hora_torch.HoraConfig(r=2, target_modules=["0"], num_heads=2)
    >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    >>> groups = hora_torch.param_groups(model, 1e-3, ratio=16)
    >>> [(group["name"], group["lr"], len(group["params"])) for group in groups]
    [('A', 0.001, 1), ('B', 0.016, 2), ('B, no decay', 0.016, 1)]
    >>> optimizer = torch.optim.AdamW(groups)
    """
    residual_decay = weight_decay if residual_decay is None else residual_decay
    if not (lr > 0 and ratio > 0 and weight_decay >= 0 and residual_decay >= 0):
        raise HoraError(
            f"lr and ratio are above 0, decays at least 0, got {lr}, {ratio}, {weight_decay} and {residual_decay}"
        )
    groups: dict[str, dict[str, Any]] = {}
    for part, decays, param in _parameters(model):
        name = part if decays else f"{part}, no decay"
        rate = lr * (ratio if part[0] == "B" else 1)
        decay = (residual_decay if part == "B, residual" else weight_decay) if decays else 0.0
        empty = {"params": [], "lr": rate, "weight_decay": decay, "name": name}
        groups.setdefault(name, empty)["params"].append(param)
    if not any(name.startswith(("A", "B")) for name in groups):
        raise HoraError("an adapter is trained, got none that requires gradients: add one, or call set_adapter first")
    return [groups[name] for name in sorted(groups)]


def _parameters(model: nn.Module) -> Iterator[tuple[_Part, bool, nn.Parameter]]:
    """Trainable parameters, what they belong to, and whether they decay."""
    seen: set[nn.Parameter] = set()
    for layer in model.modules():
        for hypernet in layer.hora_hyper.values() if isinstance(layer, HoraLayer) else ():
            for key, param in hypernet.named_parameters():
                kind = key.partition(".")[0]
                seen.add(param)
                if param.requires_grad:
                    scale_free = kind == "head_embed" and hypernet.spec.normalize
                    residual = kind == "b" and hypernet.spec.residual
                    part: _Part = "A" if kind in _OF_A else "B, residual" if residual else "B"
                    yield part, param.ndim > 1 and not scale_free, param
    for module in model.modules():
        for param in module.parameters(recurse=False):
            if param.requires_grad and param not in seen:
                seen.add(param)
                yield "other", param.ndim > 1 and "Norm" not in type(module).__name__, param
