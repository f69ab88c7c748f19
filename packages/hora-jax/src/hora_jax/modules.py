"""Modules of Flax NNX in one call: taken apart, put together while it is traced, and changed as it changed them."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from hora_spec import HoraError

from hora_jax.planning import Plan


@dataclass(frozen=True, eq=False)
class Returned:
    """Stands for one of the call's modules in what it returns; no pytree, so that it stays whole."""

    number: int


@dataclass(frozen=True, eq=False)
class Settings:
    """Attributes without arrays that a call set or deleted, by the place of their module in the graph."""

    changed: Mapping[tuple[int, str], Any]


class Modules:
    """The base, and modules among the arguments of a call, split together; merged anew while they are traced."""

    def __init__(self, values: tuple[Any, ...]) -> None:
        self._leaves, self._tree = jax.tree.flatten(values, is_leaf=is_node)
        self.nodes = [leaf for leaf in self._leaves if is_node(leaf)]
        self._graph, self._state = nnx.split(self.nodes)
        self.base = self._state[0]

    def functional(self, fn: Callable[..., Any], plan: Plan) -> Callable[[nnx.State], tuple[Any, ...]]:
        """A pure function of the base's state.

        It returns what `fn` returns, the state and the `Settings` it changed, and the planned weights it set.
        """
        planned = {site.path for layer in plan.layers for site in layer.sites}

        def call(base: nnx.State) -> tuple[Any, nnx.State, Settings, dict[str, jax.Array]]:
            state = jax.tree.map(lambda leaf: leaf, nnx.State({**self._state, 0: base}))  # variables of this trace
            before, nodes = _values(state), recomputed(nnx.merge(self._graph, state))
            parts = [(node, dict(vars(node))) for node in _parts(nodes)]
            inner = iter(nodes)
            model, args, kwargs = self._tree.unflatten([next(inner) if is_node(v) else v for v in self._leaves])
            out = _outside(fn(model, *args, **kwargs), nodes)
            changed = {
                path: v for path, (v, ids) in _values(nnx.state(nodes)).items() if before.get(path, _NEW)[1] != ids
            }
            names = {path: ".".join(map(str, path[1:])) for path in changed if path[0] == 0}
            written = {name: changed.pop(path).get_raw_value() for path, name in names.items() if name in planned}
            return out, nnx.from_flat_state(changed), _settings(parts), written

        return call

    def update(self, state: nnx.State, settings: Settings) -> None:
        """Change the modules as the call changed those that stood for them."""
        parts = list(_parts(self.nodes)) if settings.changed else []
        for (number, name), value in settings.changed.items():
            if value is _NEW:
                delattr(parts[number], name)
            else:
                setattr(parts[number], name, value)
        nnx.update(self.nodes, state)


_NEW = (None, None)


def recomputed(nodes: Any) -> Any:
    """The nodes themselves, whose cached properties are computed when they are asked for: they may have read weights
    that are others now.
    """
    for part in _parts(nodes):
        for name in [name for name in vars(part) if _is_cached(part, name)]:
            del vars(part)[name]
    return nodes


def _is_cached(node: Any, name: str) -> bool:
    return isinstance(inspect.getattr_static(type(node), name, None), functools.cached_property)


def is_node(value: Any) -> bool:
    """Whether this is a module, a variable, or another node of an NNX graph."""
    return isinstance(value, nnx.Pytree | nnx.Variable)


def _is_whole(value: Any) -> bool:
    return is_node(value) or inspect.isgenerator(value)


def nodes_of(value: Any) -> Iterator[Any]:
    """Nodes in a value: in its tree, and in methods, partial functions, closures and generators that are its leaves."""
    seen: dict[int, Any] = {}
    left = [value]
    while left:
        for leaf in jax.tree.leaves(left.pop(), is_leaf=_is_whole):
            if id(leaf) not in seen:
                seen[id(leaf)] = leaf
                if is_node(leaf):
                    yield leaf
                else:
                    left += _held(leaf)


def holds_nodes(value: Any) -> bool:
    """Whether a node is in a value; one may be false itself, as a variable that is zero."""
    return next(nodes_of(value), None) is not None


def _held(value: Any) -> list[Any]:
    """What something that is called, or goes on later, holds."""
    if isinstance(value, type):
        return []
    if inspect.isgenerator(value):
        return [] if value.gi_frame is None else [*value.gi_frame.f_locals.values()]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if not callable(value):
        return []
    cells = getattr(value, "__closure__", None) or ()
    inner = [getattr(value, name, None) for name in ("__self__", "__func__", "__wrapped__")]
    return [*inner, *(cell.cell_contents for cell in cells if _is_full(cell))]


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _parts(nodes: Any) -> Iterator[Any]:
    """Every module in the graph, in its order."""
    return (node for _, node in nnx.iter_graph(nodes) if isinstance(node, nnx.Pytree))


def _outside(out: Any, nodes: Sequence[Any]) -> Any:
    """What a call returns, where its modules themselves may be returned, but nothing that holds their traced parts."""
    whole = {id(node): Returned(number) for number, node in enumerate(nodes)}

    def leaf(value: Any) -> Any:
        if id(value) in whole:
            return whole[id(value)]
        if (held := _ids(list(nodes_of(value)))) and held & _ids(nodes):
            raise HoraError(
                f"a call of an adapted model returns values, or the model, got a {type(value).__name__} that is or "
                "holds a part of it, which knows no adapter: return its values, or use model.merged() or model.base"
            )
        return value

    return jax.tree.map(leaf, out, is_leaf=_is_whole)


def _ids(nodes: Sequence[Any]) -> set[int]:
    return {id(node) for _, node in nnx.iter_graph(nodes) if is_node(node)} if nodes else set()


def _settings(parts: list[tuple[Any, dict[str, Any]]]) -> Settings:
    changed = {}
    for number, (node, before) in enumerate(parts):
        now = vars(node)
        for name in dict.fromkeys([*before, *now]):
            value, was = now.get(name, _NEW), before.get(name, _NEW)
            if value is was or name.startswith("_pytree__") or _is_cached(node, name):
                continue
            if isinstance(value, nnx.Pytree):
                raise HoraError(
                    f"a call of an adapted model keeps its modules, got another {name!r}, a {type(value).__name__}: "
                    "put it into model.base before the call"
                )
            if value is _NEW or not node._pytree__nodes.get(name, False):  # arrays are state
                changed[number, name] = value
    return Settings(changed)


def _values(state: nnx.State) -> dict[tuple[Any, ...], tuple[Any, Any]]:
    """Every variable of a state, and which arrays it holds, by path."""
    return {path: (v, [id(leaf) for leaf in jax.tree.leaves(v)]) for path, v in nnx.to_flat_state(state)}
