"""HoRA on Flax NNX: the adapter is one tree of parameters, owned by `HoraModel` and bound to the base at each call.

No module of the base is changed and none is referenced twice, so graph mode and tree mode (``graph=False``) both work.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, final

import jax
from flax import nnx
from hora_spec import HoraError, is_trained

from hora_jax import adapter, routes
from hora_jax.adapted import Adapted, Report, walked
from hora_jax.adapter import Phi
from hora_jax.dropout import ARGUMENT, from_arguments
from hora_jax.dropout import check as check_dropout
from hora_jax.modules import Modules, Returned, holds_nodes, is_node, nodes_of
from hora_jax.planning import Plan
from hora_jax.routes import Route
from hora_jax.views import View
from hora_jax.walk import Dense, Walk, check_dense


class HoraParam(nnx.LoRAParam):
    """A trainable parameter of an adapter; filters for `nnx.LoRAParam` select it too."""


class HoraFixed(nnx.Variable):
    """A fixed A of an adapter (spec S6): stored beside its parameters, and none of them, so that nothing decays it."""


_OWN = ("base", "phi", "plan", "deterministic", "_route", "_dense", "_dropout")
_INTERNAL = "__", "_pytree__"


def _part(name: str) -> str:
    return (
        f"a HoraModel shows methods and settings of its base, {name!r} is a part of the base without the adapter, or "
        f"computed from its values: use model.apply(lambda base, ...: base.{name}..., ...), model.merged().{name} or "
        f"model.base.{name}"
    )


@final
class HoraModel(nnx.Module):
    """A frozen base with a HoRA adapter: ``model(x)`` is the base called with ``W + delta`` for every planned W.

    Parameters
    ----------
    base
        Any NNX module. A call updates its other state (caches, random streams, statistics) as one without adapter does.
    plan
        Made from `base`.
    phi
        The adapter, from `hora_jax.init` or `hora_jax.load_adapter`.
    route, dense
        As for `hora_jax.adapt`, through which the base is called: how products with planned weights are computed, and
        whether other uses of them, which cost a dense gradient, are refused.
    dropout
        As for `hora_jax.adapt`, in calls with ``dropout_key=key``. After ``model.eval()`` no key is asked for, and
        nothing dropped.

    Raises
    ------
    HoraError
        If the base does not fit the plan or is a `HoraModel`, phi belongs to another plan, or the route is unknown.

    Notes
    -----
    Train with ``nnx.Optimizer(model, tx, wrt=HoraParam)`` and ``nnx.grad(loss, argnums=nnx.DiffState(0, HoraParam))``:
    the base, and a fixed A (`HoraFixed`), then have neither gradients nor optimiser state. The hypernetworks of all
    layers run once for each call, in the dtype of phi; a branch casts its factors to the dtype of the activations (spec
    D3). Methods and properties of the base are the model's, with the adapter applied, and what they set is set in the
    base; so are its settings, read and set. Its parts are not, which know no adapter (`merged`, `apply`, `base`).
    """

    deterministic: bool = False
    """Whether nothing is dropped, as after `eval`."""

    def __init__(
        self,
        base: nnx.Module,
        plan: Plan,
        phi: Phi,
        *,
        route: Route = "auto",
        dense: Dense = "allow",
        dropout: float = 0.0,
    ) -> None:
        if isinstance(base, HoraModel):
            raise HoraError(
                "a HoraModel adapts a base of its own, got another HoraModel: adapt its merged(), a plain model"
            )
        if not isinstance(base, nnx.Module):
            raise HoraError(
                f"the base is an NNX module, got {type(base).__name__}: adapt functions with hora_jax.adapt"
            )
        adapter.weights(plan, base)
        adapter.check(plan, phi)
        routes.check(route)
        check_dense(dense)
        check_dropout(dropout, route)
        self.base = base
        specs = {key: members[0].spec for key, members in plan.groups().items()}
        self.phi = nnx.data(
            {
                key: {name: (HoraParam if is_trained(specs[key], name) else HoraFixed)(v) for name, v in own.items()}
                for key, own in phi.items()
            }
        )
        self.plan = plan
        self._route = route
        self._dense = dense
        self._dropout = dropout

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the base returns for these arguments with the adapter applied."""
        return self.apply(_call, *args, **kwargs)

    def apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``fn(base, *args, **kwargs)`` with the adapter applied to the base: for its other methods, and for loops.

        Everything inside is one call, for which factors are generated once.

        Raises
        ------
        HoraError
            If the function assigns to a planned weight.
        """
        dropout = from_arguments(self._dropout, kwargs, required=not self.deterministic)
        modules = Modules((self.base, args, kwargs))
        walk = Walk(self._route, self._dense, None if self.deterministic else dropout)
        found = walked(walk, self.plan, modules.functional(fn, self.plan), modules.base, self.adapter())
        *found, settings, written = found
        if wrong := [path for path, v in written.items() if not (isinstance(v, View) and v.untouched)]:
            raise HoraError(f"a planned weight is frozen, got an assignment to {wrong[0]} in the call: plan others")
        whole = [self, *modules.nodes[1:]]

        def outside(value: Any) -> Any:
            return whole[value.number] if isinstance(value, Returned) else walk.plain(value, None)

        out, changes = jax.tree.map(outside, found, is_leaf=lambda v: isinstance(v, View))
        modules.update(changes, settings)
        return out

    def __getattr__(self, name: str) -> Any:
        """A method of the base, to be called with the adapter applied, or a setting that it holds.

        Libraries ask a model for what it can do; that it has an adapter must not change the answer.
        """
        if name.startswith(_INTERNAL) or "base" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value, place = getattr(self.base, name), inspect.getattr_static(self.base, name, None)
        if isinstance(place, staticmethod | classmethod):
            return value
        held = name in vars(self.base)
        if callable(value) and not is_node(value) and not held and any(part is self.base for part in nodes_of(value)):
            return functools.partial(self.apply, _Method(name))
        if not held and hasattr(type(place), "__get__"):
            return self._computed(name)
        if holds_nodes(value) or any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value)):
            raise AttributeError(_part(name))
        return value

    def _computed(self, name: str) -> Any:
        """A property of the base, with the adapter applied."""
        try:
            return self.apply(attrgetter(name))
        except (HoraError, jax.errors.ConcretizationTypeError) as error:
            raise AttributeError(_part(name)) from error

    def __setattr__(self, name: str, value: Any) -> None:
        """A setting of the base is set there, so that it acts."""
        own = name in _OWN or name.startswith(_INTERNAL)
        if own:
            super().__setattr__(name, value)
        if own and not (name == "deterministic" and hasattr(self.base, name)):
            return
        if holds_nodes(value) or is_node(vars(self.base).get(name)):
            raise AttributeError(f"parts are set where they belong, got {name!r} of a HoraModel: set model.base.{name}")
        setattr(self.base, name, value)

    def train(self, **attributes: Any) -> None:
        """As the base's own, and with dropout."""
        self.deterministic = False
        self.base.train(**attributes)

    def eval(self, **attributes: Any) -> None:
        """As the base's own, and without dropout."""
        self.deterministic = True
        self.base.eval(**attributes)

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` calls.

        Args:
          deterministic: if True, dropout on the branches is off.
        """
        if deterministic is not None:
            super().__setattr__("deterministic", deterministic)  # of this module alone: a view visits all

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """Where the base consumes planned weights for these arguments; nothing is changed."""
        kwargs.pop(ARGUMENT, None)
        modules = Modules((self.base, args, kwargs))
        fn = modules.functional(_call, self.plan)
        return Adapted(lambda base: fn(base)[:2], self.plan, self._route, "allow").report(modules.base, self.adapter())

    def adapter(self) -> dict[str, dict[str, jax.Array]]:
        """The adapter's present values, as `hora_jax.merge` and `hora_jax.save_adapter` take them."""
        return {key: {name: v[...] for name, v in params.items()} for key, params in self.phi.items()}

    def merged(self) -> Any:
        """A copy of the base with the deltas merged, without adapter or overhead; this model stays as it is."""
        return adapter.merge(self.plan, self.base, self.adapter())

    def bind(self) -> Any:
        """Removed: it put stand-ins for linear modules into a copy of the base."""
        raise HoraError(
            "a base is called through its HoraModel, got bind(): use model.apply(fn, ...) or model.merged()"
        )


def _call(base: Any, *args: Any, **kwargs: Any) -> Any:
    return base(*args, **kwargs)


@dataclass(frozen=True)
class _Method:
    """Call what the base has under a name."""

    name: str

    def __call__(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(base, self.name)(*args, **kwargs)
