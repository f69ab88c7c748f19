"""Which projections take part in the output of a model, and which parameters it moves."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from hora_spec import Site
from torch import Tensor, nn

from hora_torch.targets import CONVOLUTIONS, base_module


@dataclass(frozen=True, slots=True)
class Trace:
    """One run with gradients: for each call of a layer the rows of its output that the model's output depends on."""

    _rows: Mapping[str, list[Tensor]]
    _moved: frozenset[int]

    def called(self, name: str) -> bool:
        """Whether the model called the layer."""
        return name in self._rows

    def takes_part(self, name: str, site: Site | None = None) -> bool:
        """Whether the output depends on a layer that had an input, or on one projection in it."""
        own = slice(None)
        if site is not None and site.parameter == "weight":
            own = site.layout.rows(site.weight_shape).index
        return any(bool(used[own].any()) for used in self._rows.get(name, ()))

    def moves(self, param: Tensor) -> bool:
        """Whether the output has a gradient for the parameter."""
        return id(param) in self._moved


def traced(run: Callable[[], Tensor], layers: Mapping[str, nn.Module], params: Iterable[Tensor]) -> Trace:
    """The trace of one call of `run`, which calls `layers`, and has gradients for `params`."""
    calls: list[tuple[str, Tensor]] = []
    rows: dict[str, list[Tensor]] = {}

    def hook(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        rows.setdefault(name, [])
        first, *others = (output,) if isinstance(output, Tensor) else output
        inputs = list(floating((args, kwargs)))
        if any(x.is_nested for x in (first, *inputs)) or not any(bool(x.any()) for x in inputs):  # nested: not followed
            return output
        calls.append((name, torch.zeros_like(first, requires_grad=True)))  # beside it, in case it has no graph
        first = first + calls[-1][1]
        return first if isinstance(output, Tensor) else (first, *others)

    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(lambda _, *call, name=name: hook(name, *call), with_kwargs=True)
            stack.callback(handle.remove)
        params = list(params)
        with torch.enable_grad():
            output = run()
            grads = _gradients(output, [*params, *(beside for _, beside in calls)])
    for (name, _), grad in zip(calls, grads[len(params) :], strict=True):
        if grad is not None:
            base = base_module(layers[name])
            axis = -1 - len(base.kernel_size) if isinstance(base, CONVOLUTIONS) else -1
            rows[name].append((grad != 0).movedim(axis, -1).flatten(0, -2).any(0))
    moved = (id(param) for param, grad in zip(params, grads, strict=False) if grad is not None and bool(grad.any()))
    return Trace(rows, frozenset(moved))


def _gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    """Of a random sum of an output, by what has gradients."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    graded = [leaf for leaf in leaves if leaf.requires_grad]
    found: tuple[Tensor | None, ...] = (None,) * len(graded)
    if graded and output.requires_grad:
        found = torch.autograd.grad((output * direction).sum(), graded, allow_unused=True)
    given = dict(zip(map(id, graded), found, strict=True))
    return [given.get(id(leaf)) for leaf in leaves]


def floating(value: Any) -> Iterator[Tensor]:
    """Floating tensors in nested results."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from floating(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from floating(item)
