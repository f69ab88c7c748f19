"""How long generated factors live: one call, or as long as a scope that somebody opened."""

from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import cached_property
from operator import is_
from typing import Any, Self

import torch
from hora_spec import Factors, HoraError
from torch import Tensor, nn

from hora_torch.hypernet import HoraHypernet
from hora_torch.linear import is_observed

Reach = Callable[[], Iterable[HoraHypernet]]
_Stores = dict[HoraHypernet, tuple[list[nn.Parameter], dict[Any, Any]]]
_SCOPE: ContextVar["_Scope | None"] = ContextVar("hora_torch_scope", default=None)
_interceptors = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch 2.8 has no public way


class _Scope:
    """What is kept for the hypernetworks of one model while the scope is open; only calls have a `reach`."""

    def __init__(self, model: nn.Module, reach: Reach | None = None) -> None:
        outer = _SCOPE.get()
        self.model, self.reach = model, reach
        self.chain: tuple[_Scope, ...] = (self,) if outer is None else (*outer.chain, self)
        self.captured = _capturing()
        self.open = True
        self.kept: _Stores = {}
        self.handed: _Stores = {}

    @cached_property
    def members(self) -> frozenset[HoraHypernet]:
        """The hypernetworks of the model."""
        return frozenset(module for module in self.model.modules() if isinstance(module, HoraHypernet))

    @cached_property
    def reached(self) -> dict[HoraHypernet, None]:
        """Those that will be needed, without a walk over the model."""
        return dict.fromkeys(() if self.reach is None else self.reach())

    @cached_property
    def ahead(self) -> list[HoraHypernet]:
        """Those of them that nobody has looked at yet."""
        return [*self.reached]

    def __enter__(self) -> Self:
        self._token = _SCOPE.set(self)
        return self

    def __exit__(self, *exception: object) -> None:
        """A task that inherited the scope and outlives it finds it closed."""
        self.open = False
        self.kept.clear()
        self.handed.clear()
        _SCOPE.reset(self._token)


def kept(hypernet: HoraHypernet) -> dict[Any, Any] | None:
    """What the outermost scope of this thread that covers `hypernet` keeps for it; None where nothing may be kept.

    The factors of all its projections are kept under the hypernetwork itself. The first that is asked for brings with
    it those of the model whose parameters are at hand: the same operations in a row take half the time that they take
    between those of the model.

    Nothing is kept while gradients are recorded, since a graph belongs to one call, nor while operations are traced or
    transformed; what was made from other parameter objects, as `torch.func.functional_call` lends them, is left alone.
    A CUDA graph reads at each replay what it was given when it was captured, so it is given nothing from before.
    """
    if torch.is_grad_enabled() or is_observed() or (inner := _SCOPE.get()) is None:
        return None
    captured = _capturing()
    for scope in inner.chain:
        if scope.open and scope.captured is captured and (hypernet in scope.reached or hypernet in scope.members):
            break
    else:
        return None
    store = _store(scope.kept, hypernet)
    if store is None or hypernet in store:
        return store
    store[hypernet] = hypernet(gained=False)
    while hypernet in scope.reached and scope.ahead:  # once a call: adapters times layers are many
        other = scope.ahead.pop()
        if (own := _store(scope.kept, other)) == {} and other.at_hand:
            own[other] = other(gained=False)
    return store


def handed(hypernet: HoraHypernet, projections: Collection[str]) -> dict[str, Factors] | None:
    """Factors that another projection generated in the same call of the model, each taken once, or that are made now.

    While gradients are recorded; None where nothing may be handed on, which is outside of a call, under transforms, and
    wherever saved tensors are intercepted: a checkpoint that computes a projection again must find the same operations.
    """
    if not torch.is_grad_enabled() or is_observed() or (inner := _SCOPE.get()) is None:
        return None
    if _interceptors is None or _interceptors(True) is not None:
        return None
    for scope in reversed(inner.chain):
        if scope.open and scope.reach is not None:
            break
    else:
        return None
    if (store := _store(scope.handed, hypernet)) is None:
        return None
    if any(p not in store for p in projections):
        store.update(hypernet(gained=False))
    return {p: store.pop(p) for p in projections}


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


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


def during_call(model: nn.Module, reach: Reach = tuple) -> AbstractContextManager[object]:
    """The scope of one call of a model, ``generate`` with all its steps included.

    `reach` returns the hypernetworks that the call will need, as far as that is known.
    """
    return nullcontext() if torch.compiler.is_compiling() else _Scope(model, reach)


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
    with _Scope(model) as scope:
        before = {hypernet: _values(hypernet) for hypernet in scope.members}
        with suppress(GeneratorExit):  # a generator that is closed early leaves the block as well
            yield
        changed = [hypernet.name for hypernet in scope.kept if _changed(before[hypernet], _values(hypernet))]
    if changed:
        raise HoraError(
            f"parameters stay as they are inside cached_factors, those of {sorted(changed)[:3]} were changed: end the "
            "block before training, loading or editing, and open it again"
        )


def _values(hypernet: HoraHypernet) -> dict[str, Tensor]:
    return {key: param.detach().clone() for key, param in hypernet.params().items() if not param.is_meta}


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Whether a value differs; parameters that are elsewhere by now (offloaded, sharded anew) cannot be compared."""
    return any(_differs(before[key], value) for key, value in after.items() if key in before)


def _differs(before: Tensor, after: Tensor) -> bool:
    if type(before) is not type(after) or before.shape != after.shape:
        return False
    return before.dtype != after.dtype or not torch.allclose(before, after, rtol=0, atol=0, equal_nan=True)
