"""HoRA on Flax NNX: the adapter is one tree of parameters, owned by `HoraModel` and bound to the base at each call.

No module of the base is changed and none is referenced twice, so graph mode and tree mode (``graph=False``) both work.
"""

from functools import reduce
from typing import Any, final

import jax
from flax import nnx
from hora_spec import HoraError
from jax.tree_util import GetAttrKey

from hora_jax import adapter, functional, routes
from hora_jax.adapter import Phi
from hora_jax.fused import fused
from hora_jax.plan import Plan
from hora_jax.routes import Form, Route
from hora_jax.targets import child, leaves


class HoraParam(nnx.LoRAParam):
    """A trainable parameter of an adapter; filters for `nnx.LoRAParam` select it too."""


@final
class HoraModel(nnx.Module):
    """A frozen base with a HoRA adapter: ``model(x)`` is the base called with ``W + delta`` for every planned W.

    Parameters
    ----------
    base
        Any NNX module whose planned weights belong to modules that map ``x (..., embed)`` to ``x W^T``, such as
        `nnx.Linear`, `nnx.LinearGeneral` and `nnx.Einsum`. A call updates its other state (caches, random streams,
        statistics) as a call without adapter does.
    plan
        Made from `base`.
    phi
        The adapter, from `hora_jax.init` or `hora_jax.load_adapter`.
    route
        ``"branch"``: ``y + (x A^T) B^T``. ``"merge"``: the module is called with ``W + delta``, and the gradients of x
        and the factors are low-rank; 16-bit weights take the branch all the same. ``"plain"``: the branch by JAX's own
        rules, for forward-mode differentiation. ``"auto"``: merge for float32 with more tokens than embed, else branch.

    Raises
    ------
    HoraError
        If the base does not fit the plan, phi belongs to another plan, or the route is unknown.

    Notes
    -----
    Train with ``nnx.Optimizer(model, tx, wrt=HoraParam)`` and ``nnx.grad(loss, argnums=nnx.DiffState(0, HoraParam))``:
    the base then has neither gradients nor optimiser state. The hypernetworks of all layers run once for each call, in
    the dtype of phi; a branch casts its factors to the dtype of the projection it adds to (spec D3).
    """

    def __init__(self, base: nnx.Module, plan: Plan, phi: Phi, *, route: Route = "auto") -> None:
        adapter.weights(plan, base)
        adapter.check(plan, phi)
        routes.check(route)
        self.base = base
        self.phi = nnx.data({key: {name: HoraParam(v) for name, v in params.items()} for key, params in phi.items()})
        self.plan = plan
        self.route = route

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the base returns for these arguments with the adapter applied."""
        return self.bind()(*args, **kwargs)

    def bind(self) -> Any:
        """The base with the adapter in place, sharing all its variables: for calling its other methods.

        It holds the factors of this moment, so make it anew after an optimiser step and under each transformation.
        """
        bound, phi = nnx.merge(*nnx.split(self.base)), self.adapter()
        adapter.check(self.plan, phi)
        keys = {path: leaf.keys for path, leaf in leaves(bound).items()}
        for key, members in self.plan.groups().items():
            stacked = functional.factors(members[0].spec, members[0].shape, phi[key])
            for path, *adapted in fused(members, stacked):
                _replace(bound, keys[path], path, *adapted, self.route)
        return bound

    def adapter(self) -> dict[str, dict[str, jax.Array]]:
        """The adapter's present values, as `hora_jax.merge` and `hora_jax.save_adapter` take them."""
        return {key: {name: v[...] for name, v in params.items()} for key, params in self.phi.items()}

    def merged(self) -> Any:
        """A copy of the base with the deltas merged, without adapter or overhead; this model stays as it is."""
        return adapter.merge(self.plan, self.base, self.adapter())


@final
class _Adapted(nnx.Module):
    """Stands in for a linear module during one call; its factors are variables, so a scan over layers slices them."""

    def __init__(self, inner: nnx.Module, name: str, path: str, form: Form, a: Any, b: Any, route: Route) -> None:
        self.inner = inner
        self.name = name
        self.path = path
        self.form = form
        self.route = route
        self.a, self.b = HoraParam(a), HoraParam(b)

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        form, a, b, weight = self.form, self.a[...], self.b[...], getattr(self.inner, self.name)[...]
        if getattr(self.inner, "dtype", None) in (None, weight.dtype) and routes.merges(self.route, x, weight):
            a, b = routes.follow(form, a, b, weight, form.weight)
            total = nnx.merge(*nnx.split(self.inner))  # the same variables, but for the weight
            setattr(total, self.name, nnx.Param(routes.merged(form, weight, a, b)))
            y = total(jax.lax.stop_gradient(x), *args, **kwargs)
            self._check(x, b, y)
            return routes.through(form, y, x, jax.lax.stop_gradient(weight), a, b)
        y = self.inner(x, *args, **kwargs)
        self._check(x, b, y)
        # an inner module with a narrower compute dtype casts x as well: XLA makes one cast of the two
        narrow = x.astype(y.dtype) if y.dtype.itemsize < x.dtype.itemsize else x
        a, b = routes.follow(form, a, b, y, form.y)
        return y + (routes.plain if self.route == "plain" else routes.branch)(form, narrow, a, b).astype(y.dtype)

    def _check(self, x: jax.Array, b: jax.Array, y: jax.Array) -> None:
        if y.shape != (expected := self.form.output_shape(x, b)):
            raise HoraError(
                f"the module of {self.path} must map x (..., embed) to heads as its layout says, got {x.shape} to "
                f"{y.shape} instead of {expected}: for such a model call hora_jax.merge inside the loss"
            )

    def __getattr__(self, name: str) -> Any:
        if "inner" not in vars(self):
            raise AttributeError(name)
        return getattr(self.inner, name)


def _replace(root: nnx.Module, keys: tuple[Any, ...], *args: Any) -> None:
    """Put a stand-in where the module is that owns the variable at `keys`."""
    *above, module, variable = (key for key in keys if key != GetAttrKey("value"))
    parent = reduce(child, above, root)
    wrapped = _Adapted(child(parent, module), variable.key, *args)
    if isinstance(module.key, str) and hasattr(parent, module.key):
        setattr(parent, module.key, wrapped)
    else:
        parent[module.key] = wrapped
