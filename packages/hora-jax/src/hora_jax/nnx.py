"""HoRA on Flax NNX: the adapter is one tree of parameters, owned by `HoraModel` and bound to the base at each call.

No module of the base is changed and none is referenced twice, so graph mode and tree mode (``graph=False``) both work.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, final

import jax
from flax import nnx
from hora_spec import HoraError, is_trained

from hora_jax import adapter, routes
from hora_jax.adapted import Adapted, Report, walked
from hora_jax.adapter import Phi
from hora_jax.dropout import ARGUMENT, from_arguments
from hora_jax.dropout import check as check_dropout
from hora_jax.planning import Plan
from hora_jax.routes import Route
from hora_jax.views import View
from hora_jax.walk import Dense, Walk, check_dense


class HoraParam(nnx.LoRAParam):
    """A trainable parameter of an adapter; filters for `nnx.LoRAParam` select it too."""


class HoraFixed(nnx.Variable):
    """A fixed A of an adapter (spec S6): stored beside its parameters, and none of them, so that nothing decays it."""


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
    D3). Methods of the base are methods of the model, with the adapter applied; its parts are not (`merged`, `apply`).
    """

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
        self.route = route
        self.dense = dense
        self.dropout = dropout
        self.deterministic = False  # what `nnx.Module.eval` and `train` set

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
        dropout = from_arguments(self.dropout, kwargs, required=not self.deterministic)
        modules = _Modules((self.base, args, kwargs))
        walk = Walk(self.route, self.dense, None if self.deterministic else dropout)
        found = walked(walk, self.plan, modules.functional(fn, self.plan), modules.base, self.adapter())
        *found, written = found
        if wrong := [path for path, v in written.items() if not (isinstance(v, View) and v.untouched)]:
            raise HoraError(f"a planned weight is frozen, got an assignment to {wrong[0]} in the call: plan others")
        out, changes = jax.tree.map(lambda v: walk.plain(v, None), found, is_leaf=lambda v: isinstance(v, View))
        nnx.update(modules.nodes, changes)
        return out

    def __getattr__(self, name: str) -> Any:
        """A method of the base, to be called with the adapter applied, or a setting that it holds.

        Libraries ask a model for what it can do; that it has an adapter must not change the answer.
        """
        if name.startswith("_") or "base" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = getattr(self.base, name)
        if inspect.ismethod(value) and value.__self__ is self.base:
            return functools.partial(self.apply, value.__func__)
        if any(_is_node(leaf) or isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value, is_leaf=_is_node)):
            raise AttributeError(
                f"a HoraModel shows methods and settings of its base, {name!r} is a part of the base without the "
                f"adapter: use model.apply(lambda base, ...: base.{name}..., ...), model.merged().{name} or "
                f"model.base.{name}"
            )
        return value

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """Where the base consumes planned weights for these arguments; nothing is changed."""
        kwargs.pop(ARGUMENT, None)
        modules = _Modules((self.base, args, kwargs))
        fn = modules.functional(_call, self.plan)
        return Adapted(lambda base: fn(base)[:2], self.plan, self.route, "allow").report(modules.base, self.adapter())

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


class _Modules:
    """The base, and modules among the arguments, split together; merged anew while they are traced."""

    def __init__(self, values: tuple[Any, ...]) -> None:
        self.leaves, self.tree = jax.tree.flatten(values, is_leaf=_is_node)
        self.nodes = [leaf for leaf in self.leaves if _is_node(leaf)]
        self.graph, self.state = nnx.split(self.nodes)
        self.base = self.state[0]

    def functional(self, fn: Callable[..., Any], plan: Plan) -> Callable[[nnx.State], tuple[Any, nnx.State, Any]]:
        """A pure function of the base's state: what `fn` returns, the state it changed, planned weights it set."""
        planned = {site.path for layer in plan.layers for site in layer.sites}

        def call(base: nnx.State) -> tuple[Any, nnx.State, dict[str, jax.Array]]:
            state = jax.tree.map(lambda leaf: leaf, nnx.State({**self.state, 0: base}))  # variables of this trace
            before, nodes = _values(state), nnx.merge(self.graph, state)
            inner = iter(nodes)
            model, args, kwargs = self.tree.unflatten([next(inner) if _is_node(v) else v for v in self.leaves])
            out = fn(model, *args, **kwargs)
            changed = {
                path: v for path, (v, ids) in _values(nnx.state(nodes)).items() if before.get(path, _NEW)[1] != ids
            }
            names = {path: ".".join(map(str, path[1:])) for path in changed if path[0] == 0}
            written = {name: changed.pop(path).get_raw_value() for path, name in names.items() if name in planned}
            return out, nnx.from_flat_state(changed), written

        return call


_NEW = (None, None)


def _values(state: nnx.State) -> dict[tuple[Any, ...], tuple[Any, Any]]:
    """Every variable of a state, and which arrays it holds, by path."""
    return {path: (v, [id(leaf) for leaf in jax.tree.leaves(v)]) for path, v in nnx.to_flat_state(state)}


def _is_node(value: Any) -> bool:
    return isinstance(value, nnx.Pytree | nnx.Variable)
