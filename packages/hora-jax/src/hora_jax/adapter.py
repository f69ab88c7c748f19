"""The adapter of a plan, ``phi``: its initial values, what it generates, and merging it into a tree.

``phi`` is ``{group: {canonical parameter: array (layers, ...)}}``: layers of equal shape are stacked, so generating
all factors takes one einsum for each step of the method, however deep the model.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hora_spec import Factors, HoraError, init_params, param_shapes
from jax.core import Tracer
from jax.typing import DTypeLike

from hora_jax import functional
from hora_jax.planning import Layer, Plan, check_plan
from hora_jax.targets import leaves, nnx_of
from hora_jax.trained import check_groups, undifferentiated

Phi = Mapping[str, Mapping[str, jax.Array]]


def init(plan: Plan, seed: int = 0, *, dtype: DTypeLike = jnp.float32) -> dict[str, dict[str, jax.Array]]:
    """Initial adapter: every delta is exactly zero, every value that of the spec (rules I1 to I6).

    Parameters
    ----------
    plan
        What is adapted.
    seed
        Integer of at least 0. Equal seeds and layer names give equal bits in every backend.
    dtype
        Of the parameters: float32, unless you know why.

    Returns
    -------
    dict
        Group to canonical parameter to array (layers, ...).

    Raises
    ------
    HoraError
        If the seed is not such an integer, or float64 is asked for while JAX has it switched off.
    """
    check_plan(plan)
    _check_dtype(dtype)
    return {
        key: stack([init_params(x.spec, x.shape, seed, name) for x in members for name in x.names], dtype)
        for key, members in plan.groups().items()
    }


def _check_dtype(dtype: DTypeLike) -> None:
    try:
        wanted = np.dtype(dtype) if isinstance(dtype, str | type | np.dtype) else None
    except TypeError:
        wanted = None
    if wanted is None or not jnp.issubdtype(wanted, jnp.floating):
        raise HoraError(f"parameters are floating, got dtype {dtype!r}: leave it at float32 (spec S7)")
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise HoraError(f'init makes the dtype asked for, got {wanted} without x64: set "jax_enable_x64"')


def factors(plan: Plan, phi: Phi) -> dict[str, dict[str, Factors]]:
    """Factors of every projection of every module of the tree.

    Parameters
    ----------
    plan, phi
        A plan and its adapter.

    Returns
    -------
    dict
        Name of the module, ``Layer.name``, to projection to `Factors`: a (rank, embed) and b (heads, head_dim, rank),
        with a leading layers axis where the tree stacks layers.

    Raises
    ------
    HoraError
        If phi belongs to another plan.
    """
    result = {}
    for members, stacked in generated(plan, phi):
        result |= dict(zip((x.name for x in members), unstack(members, stacked), strict=True))
    return {layer.name: result[layer.name] for layer in plan.layers}


def generated(plan: Plan, phi: Phi) -> Iterator[tuple[tuple[Layer, ...], dict[str, Factors]]]:
    """Layers of equal method and shape, and their factors stacked on a leading layers axis."""
    check(plan, phi)
    for key, members in plan.groups().items():
        spec, shape = members[0].spec, members[0].shape
        yield members, functional.factors(spec, shape, undifferentiated(spec, phi[key]))


def delta(plan: Plan, phi: Phi) -> dict[str, dict[str, jax.Array]]:
    """Dense updates ``scaling * B A``, (heads * head_dim, embed), named and stacked as in `factors`."""
    made = factors(plan, phi)
    return {
        layer.name: {p: functional.dense(f, layer.spec.scaling) for p, f in made[layer.name].items()}
        for layer in plan.layers
    }


def merge(plan: Plan, params: Any, phi: Phi, *, donate: bool = False) -> Any:
    """The tree with every delta added to its weight: a model without adapter and without overhead.

    Pure: `params` stays as it is, which makes it the exact way back. Works under `jax.jit`.

    Parameters
    ----------
    plan, params, phi
        A plan, a tree it fits, and the adapter.
    donate
        Let the merged weights take the memory of the ones they replace, which are then gone from `params`.

    Returns
    -------
    pytree
        Of params' structure and dtypes. Sums are computed in float32 or better and rounded once (spec M1).

    Raises
    ------
    HoraError
        If the tree does not fit the plan, or if a merged weight would not be finite: nothing has changed then. Inside
        your own `jax.jit` values are unknown, so only shapes are checked.

    Notes
    -----
    Merging into the result adds one more delta, which is how adapters are trained one after the other (spec M3).
    """
    check(plan, phi)
    old = weights(plan, params)
    _check_mergeable(old)
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((old, phi))):
        _check_finite(_finite(plan, old, phi))
    new = (_add_donating if donate else _add)(plan, old, phi)
    return replace_weights(params, new)


def _check_mergeable(old: Mapping[str, Any]) -> None:
    if bad := [path for path, leaf in old.items() if leaf.dtype.itemsize < 2]:
        raise HoraError(
            f"deltas are merged into weights of 16 bits or more, got {bad[0]} of dtype {old[bad[0]].dtype}, too coarse "
            "for one: train and run it through hora_jax.adapt or HoraModel, dequantise it first, or "
            "write hora_jax.export_lora (spec M1)"
        )


def weights(plan: Plan, params: Any) -> dict[str, jax.Array]:
    """The leaves of a tree that the plan adapts, by path; with `replace_weights` the exact inverse of `merge`.

    Raises
    ------
    HoraError
        If a leaf is missing or has another shape than planned.
    """
    check_plan(plan)
    found = leaves(params)
    result = {}
    for site in (site for layer in plan.layers for site in layer.sites):
        got = found[site.path].value if site.path in found else None
        if got is None or tuple(got.shape) != site.shape:
            raise HoraError(
                f"the plan adapts {site.path} of shape {site.shape}, got "
                f"{'no such leaf' if got is None else got.shape}: plan this tree"
            )
        result[site.path] = got
    return result


def replace_weights(params: Any, new: Mapping[str, jax.Array]) -> Any:
    """A copy of the tree in which the leaves at some paths are replaced.

    Raises
    ------
    HoraError
        If the tree has no leaf of such a path.
    """
    if not isinstance(new, Mapping) or (unknown := [path for path in new if path not in leaves(params)]):
        got = unknown if isinstance(new, Mapping) else repr(new)
        raise HoraError(f"leaves are replaced by their paths in the tree, got {got}: see hora_jax.weights")
    if nnx := nnx_of(params):
        from hora_jax.modules import recomputed

        graph, state = nnx.split(params)
        return recomputed(nnx.merge(graph, replace_weights(state, new)))
    by_keys = {leaf.keys: new[path] for path, leaf in leaves(params).items() if path in new}
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: by_keys.get(keys, leaf), params)


def check(plan: Plan, phi: Phi) -> None:
    """Raise unless phi has exactly the groups, parameters and shapes of the plan, all floating (spec S7)."""
    groups = check_groups(plan, phi)
    for key, members in groups.items():
        depth = sum(len(layer.names) for layer in members)
        expected = {n: (depth, *s) for n, s in param_shapes(members[0].spec, members[0].shape).items()}
        if bad := [name for name, value in phi[key].items() if not hasattr(value, "shape")]:
            raise HoraError(f"phi[{key!r}] holds arrays, got {bad} of another kind: take hora_jax.init (spec S7)")
        got = {name: tuple(value.shape) for name, value in phi[key].items()}
        if got != expected:
            wrong = sorted(set(got.items()) ^ set(expected.items()))
            raise HoraError(f"phi[{key!r}] has the shapes {expected}, got {got}; they differ in {wrong} (spec S6)")
        if bad := [
            name for name, value in phi[key].items() if not jnp.issubdtype(jnp.result_type(value), jnp.floating)
        ]:
            raise HoraError(f"phi[{key!r}] is floating, got {bad} of another dtype: cast to float32 (spec S7)")


def stack(layers: list[dict[str, np.ndarray]], dtype: DTypeLike) -> dict[str, jax.Array]:
    """Parameters of equal layers on a leading layers axis."""
    return {name: jnp.asarray(np.stack([layer[name] for layer in layers]), dtype) for name in layers[0]}


def unstack(members: tuple[Layer, ...], stacked: Any) -> list[Any]:
    """One tree per layer of the group; `jax.lax.split`, as its transpose is one concatenation.

    Layers of a stacked weight stay together on their leading axis; others lose it.
    """
    if len(members) == 1 and members[0].stacked:
        return [stacked]
    values, tree = jax.tree.flatten(stacked)
    sizes = [len(layer.names) for layer in members]
    columns = [jax.lax.split(value, sizes) for value in values]
    rows = zip(members, zip(*columns, strict=True), strict=True)
    return [tree.unflatten(row if layer.stacked else [value[0] for value in row]) for layer, row in rows]


def _sums(plan: Plan, old: Mapping[str, jax.Array], phi: Phi) -> dict[str, jax.Array]:
    new = dict(old)
    for layer, deltas in zip(plan.layers, delta(plan, phi).values(), strict=True):
        for site in layer.sites:
            new[site.path] = functional.merge(new[site.path], deltas[site.projection], site.layout)
    return new


_add = jax.jit(_sums, static_argnums=0)
_add_donating = jax.jit(_sums, static_argnums=0, donate_argnums=1)


@partial(jax.jit, static_argnums=0)
def _finite(plan: Plan, old: Mapping[str, jax.Array], phi: Phi) -> dict[str, tuple[jax.Array, jax.Array]]:
    """By path: whether every entry of the weight, and of the merged weight, is finite."""
    new = _sums(plan, old, phi)
    return {path: (jnp.isfinite(old[path]).all(), jnp.isfinite(new[path]).all()) for path in old}


def _check_finite(finite: Mapping[str, tuple[jax.Array, jax.Array]]) -> None:
    if bad := [path for path, (before, after) in jax.device_get(finite).items() if not after]:
        raise HoraError(
            f"only a finite delta that stays in the weight's range is merged, got NaN or infinity in {bad}: training "
            "diverged, or the weight's dtype is too narrow (spec M3)"
        )
