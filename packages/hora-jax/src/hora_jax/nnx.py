"""HoRA on Flax NNX: the adapter is one tree of parameters, owned by `HoraModel` and bound to the base at each call.

No module of the base is changed and none is referenced twice, so graph mode and tree mode (``graph=False``) both work.
"""

from collections.abc import Mapping
from functools import reduce
from typing import Any, Literal, final, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from hora_spec import Factors, HoraError

from hora_jax import adapter, functional, routes
from hora_jax.adapter import Phi
from hora_jax.plan import Layer, Plan
from hora_jax.targets import Site, child, leaves

Route = Literal["branch", "plain"]


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
        ``"branch"``, or ``"plain"`` for forward-mode differentiation.

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

    def __init__(self, base: nnx.Module, plan: Plan, phi: Phi, *, route: Route = "branch") -> None:
        adapter.weights(plan, base)
        adapter.check(plan, phi)
        if route not in get_args(Route):
            raise HoraError(f"route must be one of {', '.join(get_args(Route))}, got {route!r} (spec D3)")
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
        bound = nnx.merge(*nnx.split(self.base))
        owners = {path: leaf.keys[:-2] for path, leaf in leaves(bound).items()}
        factors = adapter.factors(self.plan, self.adapter())
        for layer in self.plan.layers:
            for path in dict.fromkeys(site.path for site in layer.sites):
                sites = tuple(site for site in layer.sites if site.path == path)
                _replace(bound, owners[path], _Branch, layer, sites, factors[layer.name], self.route)
        return bound

    def adapter(self) -> dict[str, dict[str, jax.Array]]:
        """The adapter's present values, as `hora_jax.merge` and `hora_jax.save_adapter` take them."""
        return {key: {name: v[...] for name, v in params.items()} for key, params in self.phi.items()}

    def merged(self) -> Any:
        """A copy of the base with the deltas merged, without adapter or overhead; this model stays as it is."""
        return adapter.merge(self.plan, self.base, self.adapter())


@final
class _Branch(nnx.Module):
    """Stands in for a linear module during one call; its factors are variables, so a scan over layers slices them."""

    def __init__(
        self, inner: nnx.Module, layer: Layer, sites: tuple[Site, ...], factors: Mapping[str, Factors], route: Route
    ) -> None:
        self.inner = inner
        self.sites = sites
        self.scaling = layer.spec.scaling
        self.route = route
        self.factors = nnx.data([[HoraParam(_like(s, f)) for f in factors[s.projection]] for s in sites])

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        y = self.inner(x, *args, **kwargs)
        for site, (a, b) in zip(self.sites, self.factors, strict=True):
            # an inner module with a narrower compute dtype casts x as well: XLA makes one cast of the two
            narrow = x.astype(y.dtype) if y.dtype.itemsize < x.dtype.itemsize else x
            factors = routes.follow(Factors(a[...], b[...]), y, -1 if "hk" in site.layout.axes else -2)
            z = functional.branch(_inputs(narrow, site), factors, self.scaling, route=self.route)
            z = z if "hk" in site.layout.axes else z.reshape(*z.shape[:-1], *factors.b.shape[:2])
            y = y + _place(z, x, y, site).astype(y.dtype)
        return y

    def __getattr__(self, name: str) -> Any:
        if "inner" not in vars(self):
            raise AttributeError(name)
        return getattr(self.inner, name)


_OUTPUT_AXES = {"hk": -1, "h": -2, "1": 0}  # where an axis of a weight is in the output of its module


def _inputs(x: jax.Array, site: Site) -> jax.Array:
    """The part of the inputs that a projection reads."""
    window = site.layout.window
    return x[..., window.start : window.stop] if window and site.layout.axes[window.axis] == "d" else x


def _place(z: jax.Array, x: jax.Array, y: jax.Array, site: Site) -> jax.Array:
    """The branch's output in the form of the inner module's output, zero outside its window."""
    axes, window = [name for name in site.layout.axes if name != "l"], site.layout.window
    z = z[None] if axes[0] == "1" else z  # several maps in one weight, as einsums with a leading output axis make them
    if window is not None and site.layout.axes[window.axis] in _OUTPUT_AXES and z.ndim == y.ndim:
        axis = _OUTPUT_AXES[site.layout.axes[window.axis]]
        pads = [(0, 0)] * z.ndim
        pads[axis] = (window.start, y.shape[axis] - window.stop)
        z = jnp.pad(z, pads)
    if z.shape != y.shape:
        raise HoraError(
            f"the module of {site.path} must map x (..., embed) to heads laid out as {site.layout.pattern!r}, got "
            f"{x.shape} to {y.shape} instead of {z.shape}: for such a model call hora_jax.merge inside the loss"
        )
    return z


def _like(site: Site, factor: jax.Array) -> jax.Array:
    """A stacked factor with its layers axis where the weight has it, so that one `in_axes` serves both."""
    if not site.layout.stacked:
        return factor
    axis = site.layout.axes.index("l")
    return jnp.moveaxis(factor, 0, -1 if axis == len(site.shape) - 1 else axis)


def _replace(root: nnx.Module, keys: tuple[Any, ...], wrap: Any, *args: Any) -> None:
    parent = reduce(child, keys[:-1], root)
    name, wrapped = keys[-1].key, wrap(child(parent, keys[-1]), *args)
    if isinstance(name, str) and hasattr(parent, name):
        setattr(parent, name, wrapped)
    else:
        parent[name] = wrapped
