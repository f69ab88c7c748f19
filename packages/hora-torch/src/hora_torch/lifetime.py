"""How long generated factors live: one call, or as long as a scope that somebody opened."""

from collections.abc import Generator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cached_property
from operator import is_
from typing import Any

import torch
from hora_spec import Factors, HoraError
from torch import Tensor, nn

from hora_torch.hypernet import HoraHypernet
from hora_torch.linear import is_observed

_Stores = dict[HoraHypernet, tuple[list[nn.Parameter], dict[Any, Any]]]


class _Scope:
    """What is kept for the hypernetworks of one model while the scope is open."""

    def __init__(self, model: nn.Module, outer: "_Scope | None", *, call: bool) -> None:
        self.model, self.outer, self.call = model, outer, call
        self.open = True
        self.kept: _Stores = {}
        self.handed: _Stores = {}

    @cached_property
    def members(self) -> frozenset[HoraHypernet]:
        """The hypernetworks of the model."""
        return frozenset(module for module in self.model.modules() if isinstance(module, HoraHypernet))

    def close(self) -> None:
        """A task that inherited the scope and outlives it finds it closed."""
        self.open = False
        self.kept.clear()
        self.handed.clear()


_interceptors = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)  # torch 2.8, which has no public way
_SCOPE: ContextVar[_Scope | None] = ContextVar("hora_torch_scope", default=None)


def kept(hypernet: HoraHypernet) -> dict[Any, Any] | None:
    """What the outermost scope of this thread that covers `hypernet` keeps for it; None where nothing may be kept.

    Nothing is kept while gradients are recorded, since a graph belongs to one call, nor while operations are traced or
    transformed; what was made from other parameter objects, as `torch.func.functional_call` lends them, is left alone.
    """
    if torch.is_grad_enabled() or is_observed():
        return None
    scope, found = _SCOPE.get(), None
    while scope is not None:
        if scope.open and hypernet in scope.members:
            found = scope
        scope = scope.outer
    return None if found is None else _store(found.kept, hypernet)


def handed(hypernet: HoraHypernet) -> dict[str, Factors] | None:
    """What one projection of a layer generated for the next in the same call of the model, each to be taken out once.

    While gradients are recorded; None where nothing may be handed on, which is outside of a call, under transforms, and
    wherever saved tensors are intercepted: a checkpoint that computes a projection again must find the same operations.
    """
    if not torch.is_grad_enabled() or is_observed() or _interceptors is None or _interceptors(True) is not None:
        return None
    scope = _SCOPE.get()
    while scope is not None and not (scope.open and scope.call):
        scope = scope.outer
    return None if scope is None else _store(scope.handed, hypernet)


def _store(stores: _Stores, hypernet: HoraHypernet) -> dict[Any, Any] | None:
    """Of the parameter objects that the hypernetwork has now; meta ones stand for what is elsewhere."""
    params = hypernet.registered()
    if params is None:
        return None
    entry = stores.get(hypernet)
    if entry is None:
        entry = stores[hypernet] = (params, {})
    before, store = entry
    if all(map(is_, before, params)) or all(a is b or b.is_meta for a, b in zip(before, params, strict=True)):
        return store
    return None


@contextmanager
def during_call(model: nn.Module) -> Generator[None, None, None]:
    """The scope of one call of a model, ``generate`` with all its steps included."""
    if torch.compiler.is_compiling():
        yield
        return
    with _opened(model, call=True):
        yield


@contextmanager
def cached_factors(model: nn.Module) -> Generator[None, None, None]:
    """Generate the factors of `model` once, and keep them until the block ends.

    For decoding loops of your own, and wherever an adapted model is called many times without being trained;
    ``PeftModel.generate`` does it by itself. Outside such a block nothing is kept between calls. Merging, export and
    calls that record gradients never use kept factors; other threads do not see them.

    Parameters
    ----------
    model
        A ``PeftModel``, or a model into which adapters were injected.

    Raises
    ------
    HoraError
        On leaving the block, if a parameter of a used adapter is not what it was: later calls did not see it. A change
        that is undone inside the block is not noticed, so end the block before swapping in an average.

    Examples
    --------
    >>> import torch, peft, hora_torch
    >>> config = hora_torch.HoraConfig(r=2, target_modules=["0"], num_heads=2)
    >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    >>> with torch.no_grad(), hora_torch.cached_factors(model):
    ...     outputs = [model(torch.ones(1, 4)) for _ in range(3)]
    """
    with _opened(model, call=False) as scope:
        before = {hypernet: _values(hypernet) for hypernet in scope.members}
        with suppress(GeneratorExit):  # a generator that is closed early leaves the block as well
            yield
        changed = [hypernet.name for hypernet in scope.kept if _changed(before[hypernet], _values(hypernet))]
    if changed:
        raise HoraError(
            f"parameters stay as they are inside cached_factors, those of {sorted(changed)[:3]} were changed: end the "
            "block before training, loading or editing, and open it again"
        )


@contextmanager
def _opened(model: nn.Module, *, call: bool) -> Generator[_Scope, None, None]:
    scope = _Scope(model, _SCOPE.get(), call=call)
    token = _SCOPE.set(scope)
    try:
        yield scope
    finally:
        scope.close()
        _SCOPE.reset(token)


def _values(hypernet: HoraHypernet) -> dict[str, Tensor]:
    return {key: param.detach().clone() for key, param in hypernet.params().items() if not param.is_meta}


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Whether a value differs; parameters that are elsewhere by now (offloaded, sharded anew) cannot be compared."""
    return any(_differs(before[key], value) for key, value in after.items() if key in before)


def _differs(before: Tensor, after: Tensor) -> bool:
    if type(before) is not type(after) or before.shape != after.shape:
        return False
    return before.dtype != after.dtype or not torch.allclose(before, after, rtol=0, atol=0, equal_nan=True)
