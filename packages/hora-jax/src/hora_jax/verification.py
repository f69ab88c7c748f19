"""Whether an adapter does what its plan says on a model, found by running it rather than by names."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hora_jax.adapted import Report, adapt
from hora_jax.adapter import Phi, check, merge, replace_weights, weights
from hora_jax.planning import Plan
from hora_jax.routes import Route
from hora_jax.targets import leaves
from hora_jax.trained import join, split

_ROUNDINGS = 64
"""Rounding errors of the largest output that adapted and merged may differ by; layers of a network add them up."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes
    ----------
    problems
        What is wrong, in words; empty if nothing is.
    error, allowed, effect
        Largest difference between adapted and merged outputs, how large rounding may make it, and the largest
        difference that the tried adapter makes to the base's outputs.
    uses
        Where planned weights are consumed.
    tied
        Other leaves that are the same array as a planned one, by the planned path: merging does not change them.
    """

    problems: tuple[str, ...]
    error: float
    allowed: float
    effect: float
    uses: Report
    tied: dict[str, tuple[str, ...]]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        verdict = "verified" if self.ok else "not verified"
        differs = (
            f"adapted differs from merged by {self.error:.1e}, allowed {self.allowed:.1e}, effect {self.effect:.1e}"
        )
        return "\n".join([f"{verdict}: {differs}", *(f"  {problem}" for problem in self.problems), str(self.uses)])


def verify(
    plan: Plan, fn: Callable[..., Any], params: Any, phi: Phi, *args: Any, route: Route = "auto", **kwargs: Any
) -> Verification:
    """Try an adapter on real inputs: adapted equals merged, and every factor learns.

    Parameters
    ----------
    plan, fn, params, phi, args, kwargs
        As `hora_jax.adapt` and the function it returns take them. Nothing of them is changed: what is tried is `phi`
        with every value moved, since a fresh adapter changes nothing.
    route
        As for `hora_jax.adapt`.

    Returns
    -------
    Verification
        It lists differences between adapted and merged outputs beyond rounding, an adapter without effect, planned
        weights that `fn` does not consume, parameters without a finite gradient that is not zero, and tied leaves.

    Notes
    -----
    `fn` has to be pure: without dropout, or with its keys fixed. For a Flax NNX model pass the model as `params`, and
    ``lambda model, x: model(x)`` as `fn`. Where weights of 16 bits are merged, their rounding is allowed for; products
    are computed at the highest precision, unless `fn` asks for another.
    """
    check(plan, phi)
    adapted, tried = adapt(fn, plan, route=route), _moved(phi)
    uses, tied = adapted.report(params, tried, *args, **kwargs), _tied(plan, params)
    old = weights(plan, params)

    def outputs(value: Any) -> list[jax.Array]:
        return [v for v in jax.tree.leaves(value) if hasattr(v, "dtype") and jnp.issubdtype(v.dtype, jnp.floating)]

    trained, fixed = split(plan, tried)

    def by_branch(trained: Phi) -> list[jax.Array]:
        return outputs(adapted(params, join(trained, fixed), *args, **kwargs))

    def by_merging(phi: Phi, old: Any) -> list[jax.Array]:
        return outputs(fn(merge(plan, replace_weights(params, old), phi), *args, **kwargs))

    with jax.default_matmul_precision("highest"):  # GPUs round products of float32 otherwise
        got, pullback = jax.vjp(jax.jit(by_branch), trained)
        merged = jax.jit(by_merging)(tried, old)
        base = outputs(fn(params, *args, **kwargs))
        grads = pullback([jnp.asarray(np.random.default_rng(1).normal(size=v.shape), v.dtype) for v in got])[0]
    error, effect, size = _largest(got, merged), _largest(merged, base), _largest(merged, [0 * v for v in merged])
    rounded = [*got, *old.values(), *jax.tree.leaves(tried)]  # factors are made in the dtype of phi
    eps = max(float(jnp.finfo(v.dtype).eps) for v in rounded if jnp.issubdtype(v.dtype, jnp.floating))
    allowed = _ROUNDINGS * eps * size
    problems = [
        *([f"adapted and merged outputs differ by {error:.1e}, more than rounding"] if not error <= allowed else []),
        *(["the adapter has no effect on the outputs"] if not effect > 0 else []),
        *(f"{path} is not consumed" for path in uses.unused),
        *(f"{name} has no gradient" for name in _without_gradient(plan, grads)),
        *(f"{path} is the same array as {', '.join(others)}: merging unties them" for path, others in tied.items()),
    ]
    return Verification(tuple(problems), error, allowed, effect, uses, tied)


def _moved(phi: Phi) -> dict[str, dict[str, jax.Array]]:
    rng = np.random.default_rng(0)

    def move(value: jax.Array) -> jax.Array:
        spread = 0.3 * float(jnp.abs(value.astype(jnp.float32)).max()) or 0.02
        return value + jnp.asarray(spread * rng.normal(size=value.shape), value.dtype)

    return {key: {name: move(jnp.asarray(v)) for name, v in params.items()} for key, params in phi.items()}


def _largest(ones: list[jax.Array], others: list[jax.Array]) -> float:
    pairs = zip(ones, others, strict=True)
    return max((float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max()) for a, b in pairs), default=0.0)


def _without_gradient(plan: Plan, grads: Phi) -> Iterator[str]:
    """Trained parameters of single layers whose gradient is zero or not finite."""
    for key, members in plan.groups().items():
        names = [name for layer in members for name in layer.names]
        for parameter, value in grads[key].items():
            rows = np.abs(np.asarray(value, np.float32)).reshape(len(names), -1).max(1)
            yield from (
                f"{parameter} of {name}" for name, size in zip(names, rows, strict=True) if not 0 < size < np.inf
            )


def _tied(plan: Plan, params: Any) -> dict[str, tuple[str, ...]]:
    found = leaves(params)
    planned = {site.path: found[site.path].value for layer in plan.layers for site in layer.sites}
    owners = {id(value): path for path, value in planned.items()}
    tied: dict[str, tuple[str, ...]] = {}
    for path, leaf in found.items():
        if (owner := owners.get(id(leaf.value))) not in (None, path):
            tied[owner] = (*tied.get(owner, ()), path)
    return tied
