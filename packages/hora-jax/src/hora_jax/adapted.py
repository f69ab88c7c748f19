"""Any JAX function with ``W + delta`` in place of the planned weights, without a dense gradient of any of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import jax
import jax.numpy as jnp
from hora_spec import HoraError

from hora_jax import adapter, routes
from hora_jax.adapter import Phi
from hora_jax.dropout import ARGUMENT, from_arguments
from hora_jax.dropout import check as check_dropout
from hora_jax.pairs import pairs
from hora_jax.planning import Plan, check_plan
from hora_jax.routes import Route, Way
from hora_jax.trained import check_groups
from hora_jax.views import View
from hora_jax.walk import Dense, Use, Walk, check_dense


@dataclass(frozen=True)
class Report:
    """Where a function consumes its planned weights.

    Attributes
    ----------
    uses
        In the order of the program; a place that runs several times, as in a loop, counts once.
    unused
        Paths that the function does not consume: their factors get no gradient.
    """

    uses: tuple[Use, ...]
    unused: tuple[str, ...]

    @property
    def low_rank(self) -> tuple[Use, ...]:
        """Products that are the base's plus a branch."""
        return tuple(use for use in self.uses if use.low_rank)

    @property
    def dense(self) -> tuple[Use, ...]:
        """Uses that take ``W + delta``, at the price of a gradient as large as the weight."""
        return tuple(use for use in self.uses if not use.low_rank)

    def __str__(self) -> str:
        lines = [f"low-rank: {len(self.low_rank)}, dense: {len(self.dense)}, unused: {len(self.unused)}"]
        lines += [f"  dense: {use.path} in {use.primitive}{f' at {use.place}' * bool(use.place)}" for use in self.dense]
        return "\n".join([*lines, *(f"  unused: {path}" for path in self.unused)])


@final
class Adapted:
    """What `adapt` returns: a function of the parameters, the adapter, and the arguments of the adapted function."""

    def __init__(self, fn: Callable[..., Any], plan: Plan, route: Way, dense: Dense, dropout: float = 0.0) -> None:
        self.fn = fn
        self.plan = plan
        self.route: Way = route
        self.dense: Dense = dense
        self.dropout = dropout

    def __call__(self, params: Any, phi: Phi, *args: Any, **kwargs: Any) -> Any:
        """``fn(merge(plan, params, phi), *args, **kwargs)`` without merging.

        The keyword argument ``dropout_key`` is not passed on: the key of this call's dropout, None for none. It is
        required where the function was adapted with dropout.
        """
        dropout = from_arguments(self.dropout, kwargs)
        return self._run(Walk(self.route, self.dense, dropout), params, phi, *args, **kwargs)

    def report(self, params: Any, phi: Phi, *args: Any, **kwargs: Any) -> Report:
        """Where planned weights are consumed for these arguments, some of which may be shapes alone."""
        walk = Walk(self.route, "allow")
        kwargs.pop(ARGUMENT, None)
        leaves, tree = jax.tree.flatten((params, phi, args, kwargs))
        shapes = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)}

        def run(values: dict[int, Any]) -> Any:
            params, phi, args, kwargs = tree.unflatten([values.get(i, leaf) for i, leaf in enumerate(leaves)])
            self._run(walk, params, phi, *args, **kwargs)

        jax.eval_shape(run, shapes)
        used = {path for use in walk.uses.values() for path in use.path.split(" + ")}
        planned = dict.fromkeys(site.path for layer in self.plan.layers for site in layer.sites)
        return Report(tuple(walk.uses.values()), tuple(path for path in planned if path not in used))

    def _run(self, walk: Walk, params: Any, phi: Phi, *args: Any, **kwargs: Any) -> Any:
        found = walked(walk, self.plan, lambda params: self.fn(params, *args, **kwargs), params, phi)
        return jax.tree.map(lambda value: walk.plain(value, None), found, is_leaf=lambda v: isinstance(v, View))


def walked(walk: Walk, plan: Plan, fn: Callable[[Any], Any], params: Any, phi: Phi) -> Any:
    """What ``fn(params)`` returns with the adapter applied; a `View` where that is a planned weight."""
    old, outputs = adapter.weights(plan, params), _Outputs()
    program = jax.make_jaxpr(lambda new: outputs.arrays(fn(adapter.replace_weights(params, new))))(old)
    if not (program.jaxpr.outvars or program.effects):
        return outputs.tree([])
    views = _views(plan, old, phi)
    return outputs.tree(walk.run(program, [views[path] for path in sorted(old)]))  # as JAX flattens a dict


def adapt(
    fn: Callable[..., Any], plan: Plan, *, route: Route = "auto", dense: Dense = "allow", dropout: float = 0.0
) -> Adapted:
    """The function with the adapter applied to the parameters that are its first argument.

    ``adapt(fn, plan)(params, phi, *args, **kwargs)`` equals ``fn(merge(plan, params, phi), *args, **kwargs)`` in value
    and in its gradients of phi and of the arguments, and forms no gradient as large as an adapted weight.

    Parameters
    ----------
    fn
        Any function that JAX can trace: ``fn(params, *args, **kwargs)``. It may return any tree.
    plan
        What is adapted in ``params``.
    route
        ``"branch"``: the base's product plus ``(x A^T) B^T``. ``"merge"``: a product with ``W + delta``, and low-rank
        gradients; 16 bits take the branch all the same. ``"plain"``: the branch by JAX's own rules, for forward-mode
        differentiation. ``"auto"``: merge for float32 with more tokens than embed, else branch.
    dense
        What happens where a planned weight is consumed by something else than a product with activations: ``"allow"``
        computes with ``W + delta`` there, and `Adapted.report` lists the place; ``"error"`` refuses.
    dropout
        Probability that an entry of a branch's input is dropped, in calls with ``dropout_key=key``; in others
        ``dropout_key=None``. Each product with a planned weight drops entries of its own, in a loop at each step; all
        projections of one weight share them. The key is the caller's: another one at each step, under `jax.vmap` in
        each row.

    Returns
    -------
    Adapted
        A pure function, to be compiled by your own `jax.jit`: it traces `fn` at every call. Planned weights are
        constants to it, their gradient is zero by definition.

    Raises
    ------
    HoraError
        If the route is unknown or the dropout no rate; when called, if params or phi do not fit the plan, a dense use
        is refused, or dropout has no key or meets a dense use, on which it cannot act.

    Notes
    -----
    Spec D3. The function is traced and its program run again with each planned weight followed through casts, reshapes,
    transposes, slices, concatenations, and through jit, remat, scan, while, cond, shard_map and vmap. What is inside
    a `jax.custom_vjp` or `jax.custom_jvp` has derivatives of its own, so that weights enter it as ``W + delta``.

    Examples
    --------
    >>> import jax
    >>> import hora_jax
    >>> from hora_spec import AdapterSpec
    >>> params = {"attn": {"q": jax.numpy.ones((16, 4, 4))}}
    >>> plan = hora_jax.make_plan(params, AdapterSpec(rank=2), hora_jax.Target("*.q", "q", "d h k", layer="attn"))
    >>> adapted = adapt(lambda params, x: jax.numpy.einsum("bd,dhk->bhk", x, params["attn"]["q"]), plan)
    >>> x, phi = jax.numpy.ones((3, 16)), hora_jax.init(plan)
    >>> adapted(params, phi, x).shape
    (3, 4, 4)
    >>> print(adapted.report(params, phi, x))
    low-rank: 1, dense: 0, unused: 0
    """
    check_plan(plan)
    check_function(fn)
    routes.check(route)
    check_dense(dense)
    check_dropout(dropout, route)
    return Adapted(fn, plan, route, dense, dropout)


def check_function(fn: Any) -> None:
    """Raise unless `fn` can be called."""
    if not callable(fn):
        raise HoraError(f"a function of the parameters is adapted, got {fn!r:.60}: fn(params, *args)")


def adapt_each(fn: Callable[..., Any], plan: Plan, *, dense: Dense = "allow") -> Callable[..., Any]:
    """The function with another adapter for each row of a batch: ``adapt_each(fn, plan)(params, phis, *args)``.

    Parameters
    ----------
    fn, plan, dense
        As for `adapt`; `fn` computes one row, without the batch axis.

    Returns
    -------
    function
        Of the parameters, adapters stacked on a leading axis, ``jax.tree.map(lambda *v: jnp.stack(v), *phis)``, and
        arrays with that axis. The base's products are shared, and no row has a weight of its own: all take the branch.
    """
    adapted = adapt(fn, plan, route="branch", dense=dense)

    def each(params: Any, phis: Phi, *args: Any) -> Any:
        check_groups(plan, phis)
        if bad := [k for own in phis.values() for k, v in own.items() if not getattr(v, "ndim", 0)]:
            raise HoraError(f"adapters are stacked on a leading axis, got {bad} without one: stack what init makes")
        return jax.vmap(lambda phi, *row: adapted(params, phi, *row))(phis, *args)

    return each


class _Outputs:
    """The tree that a traced function returned: its arrays are results of the program, other leaves stay."""

    def arrays(self, out: Any) -> list[jax.Array]:
        leaves, self.structure = jax.tree.flatten(out)
        self.static = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, jax.Array)}
        return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    def tree(self, arrays: Sequence[jax.Array]) -> Any:
        rest = iter(arrays)
        total = len(arrays) + len(self.static)
        return self.structure.unflatten([self.static[i] if i in self.static else next(rest) for i in range(total)])


def _views(plan: Plan, weights: dict[str, Any], phi: Phi) -> dict[str, View]:
    found = {}
    for members, stacked in adapter.generated(plan, phi):
        for path, a, b in pairs(members, stacked):
            found[path] = _view(weights[path], a, b, path)
    return found


def _view(weight: Any, a: jax.Array, b: jax.Array, path: str) -> View:
    w = jax.lax.stop_gradient(jnp.asarray(weight))
    codes = not jnp.issubdtype(w.dtype, jnp.floating)  # scales of codes might be trained
    return View(w, a, b, path, constant=not codes, codes=codes, axes=tuple(range(w.ndim)))
