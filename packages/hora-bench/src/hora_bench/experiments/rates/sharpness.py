"""The largest eigenvalue of the Hessian of the training loss, at the start and as AdamW sees it after the warm-up.

Matrix-free: products with the Hessian are gradients of gradients, and a Lanczos routine asks for a dozen of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
from hora_spec import HoraError
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hora_bench.recipe import subset
from hora_bench.request import Inputs, Request
from hora_bench.screen import Cached, Stack, model_of, tokens, train

TOLERANCE: Final = 1e-2  # of the eigenvalue, relative; it differs by factors
VECTORS: Final = 8  # of a Lanczos basis; ARPACK's usual 20 take twice the products
Values = dict[str, torch.Tensor]
ADAPTER: Final = "adapter_at_start"
ALL: Final = "all_at_start"
STEPPED: Final = "adamw_after_warm_up"
KINDS: Final = {
    ADAPTER: "the adapter's trained values, at the start",
    ALL: "all trained values, at the start",
    STEPPED: "all trained values in AdamW's units, after the warm-up",
}


def sharpness(asked: Request, task: Any, inputs: Inputs) -> dict[str, float]:
    """Largest eigenvalues of one seed: `KINDS` to numbers.

    Parameters
    ----------
    asked
        A screen; its rate is the one of the warm-up.
    task, inputs
        Its data.

    Notes
    -----
    Of the mean loss of all training examples of the seed. AdamW divides a step by the root of its running mean of
    squared gradients, plus eps: D. After the warm-up the eigenvalue is that of ``D^-1/2 H D^-1/2``. At the first step D
    is the size of the gradient itself, which is 0 for an A whose B starts at 0, so that eps would decide.
    """
    device = torch.device("cuda" if asked.device != "cpu" and torch.cuda.is_available() else "cpu")
    size, blocks = asked.image_size_px or 0, asked.last_blocks or 0
    seen = tokens(Cached(inputs.data_sha256, asked.model, size, blocks, asked.train_on, device, task))
    members = subset(task.labels(asked.train_on), asked.fraction, asked.seed)
    model = model_of(asked, task, seen, members).eval()
    rows = torch.from_numpy(members).to(device)
    loss = loss_of(model, seen.hidden[rows], seen.label[rows], seen.weight[rows])
    start = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    found = {
        ADAPTER: largest(loss, start, [name for name in start if not is_head(name)], seed=asked.seed),
        ALL: largest(loss, start, list(start), seed=asked.seed),
    }
    stack, scales = Stack([model], device), {}

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        group, state = optimizer.param_groups[0], optimizer.state
        for name, value in stack.trained.items():
            own = state[value]
            correction = 1 - group["betas"][1] ** float(own["step"])
            scales[name] = (own["exp_avg_sq"][0] / correction).sqrt() + group["eps"]

    handle = register_optimizer_step_post_hook(note)
    try:
        steps = max(1, asked.warmup_steps)
        train(stack, [asked.replace(steps=steps)], [members], seen)
    finally:
        handle.remove()
    values = {name: value[0].detach() for name, value in stack.trained.items()}
    return found | {STEPPED: largest(loss, values, list(values), scales=scales, seed=asked.seed)}


def is_head(name: str) -> bool:
    """Whether a parameter is of the new head, which every method trains."""
    return "head" in name.split(".")


def loss_of(
    model: nn.Module, hidden: torch.Tensor, label: torch.Tensor, weight: torch.Tensor
) -> Callable[[Values], torch.Tensor]:
    """The mean loss of these examples as a function of the trained values."""

    def loss(values: Values) -> torch.Tensor:
        logits = torch.func.functional_call(model, values, (hidden,))
        each = nn.functional.cross_entropy(logits, label, reduction="none")
        return (each * weight).sum() / weight.sum().clamp(min=1)

    return loss


def largest(
    loss: Callable[[Values], torch.Tensor],
    values: Values,
    names: list[str],
    *,
    scales: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
) -> float:
    """Largest eigenvalue, with its sign, of the Hessian with respect to some of the values.

    Parameters
    ----------
    loss
        A scalar function of `values`.
    values
        Where.
    names
        Of the values that may change.
    scales
        Positive, with the shapes of the values: the Hessian in units of their roots.
    seed
        Of the first vector.

    Raises
    ------
    HoraError
        There is nothing to change, the loss is not finite, or the search for the eigenvalue did not end.
    """
    size = sum(values[name].numel() for name in names)
    if not size:
        raise HoraError("curvature is that of trained values, got a method that trains none there: leave it out")
    fixed = {name: value for name, value in values.items() if name not in names}
    moved = {name: values[name] for name in names}
    if not torch.isfinite(loss(values)):
        raise HoraError("curvature is that of a finite loss, got one that is not: lower the first rate")
    roots = {name: scales[name].sqrt() if scales else torch.ones_like(values[name]) for name in names}
    _, back = torch.func.vjp(torch.func.grad(lambda part: loss({**fixed, **part})), moved)  # H is symmetric

    def product(vector: np.ndarray) -> np.ndarray:
        """Of the Hessian and a vector."""
        parts = torch.from_numpy(np.ascontiguousarray(vector).ravel()).split([moved[name].numel() for name in names])
        along = {
            name: part.to(moved[name]).reshape(moved[name].shape) / roots[name]
            for name, part in zip(names, parts, strict=True)
        }
        (turned,) = back(along)
        return torch.cat([(turned[name] / roots[name]).ravel() for name in names]).double().cpu().numpy()

    operator = _Symmetric(product, size)
    first = np.random.default_rng([seed, 7]).normal(size=size)
    if size <= VECTORS:
        return float(np.linalg.eigvalsh(operator @ np.eye(size))[-1])
    try:
        found = eigsh(operator, 1, which="LA", v0=first, ncv=VECTORS, tol=TOLERANCE, return_eigenvectors=False)
    except ArpackError as error:
        raise HoraError(f"an eigenvalue is found in so many products, got {error}: use another seed") from error
    return float(found[0])


class _Symmetric(LinearOperator):
    """A symmetric matrix that is known by its products with vectors."""

    def __init__(self, product: Callable[[np.ndarray], np.ndarray], size: int) -> None:
        super().__init__(np.float64, (size, size))
        self._product = product

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._product(x)
