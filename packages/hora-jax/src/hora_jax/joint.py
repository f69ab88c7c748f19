"""The joint start of A for any JAX function: what its loss wants all heads to read (spec I7).

With A at zero and B at probes P, or the other way round, the delta is zero and the gradient of the other factor is a
product with the gradient G of the weight: ``P^T G`` or ``G Q^T``. So `adapt` on a plan of LoRA's form measures them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hora_spec import AdapterSpec, HoraError, JointStart, Measure, Moments, joint_start
from hora_spec.joint import LOSS_SCALE, Probes, Scale, Source, few

from hora_jax import adapter
from hora_jax.adapted import Adapted, check_function
from hora_jax.adapter import Phi
from hora_jax.planning import Plan
from hora_jax.processes import on_host

Loss = Callable[[Any, Any], jax.Array]


def joint_a(
    plan: Plan,
    loss: Loss,
    params: Any,
    phi: Phi,
    batches: Iterable[Any],
    *,
    of: Source = "gradient",
    scale: Scale = "kaiming",
    together: bool = False,
    power: int = 1,
    oversample: int = 8,
    seed: int = 0,
) -> tuple[dict[str, dict[str, jax.Array]], JointStart]:
    """Start the A of every planned layer where a few batches say that the heads should read, before training.

    It takes ``2 * power + 3`` passes forward and backward over the batches, ``power + 3`` with ``of="inputs"``.

    Parameters
    ----------
    plan
        Its heads share a free or fixed A: ``hora_spec.preset("joint", rank)``.
    loss
        ``loss(params, batch) -> scalar``, a mean, without dropout: every pass must see the same function.
    params, phi
        The base and an adapter that was not trained; neither is changed.
    batches
        All of them are kept for the passes, so a handful, at most 256; each counts equally, and so does each token that
        a projection is given: give none as padding.
    of, scale, together, power, oversample, seed
        As in `hora_spec.joint_start`. The seed of `init` finds what `hora_torch.joint_a` finds.

    Returns
    -------
    tuple
        phi with the new A, and the written values with their singular values.

    Raises
    ------
    HoraError
        If the adapter was trained already, has no such A, or what is measured has too few directions (spec I7).

    Examples
    --------
    >>> import jax
    >>> import hora_jax
    >>> from hora_spec import preset
    >>> params = {"attn": {"q": jax.random.normal(jax.random.key(0), (16, 4, 4))}}
    >>> plan = hora_jax.make_plan(params, preset("joint", 2), hora_jax.Target("*.q", "q", "d h k", layer="attn"))
    >>> def loss(params, x):
    ...     return jax.numpy.square(jax.numpy.einsum("bd,dhk->bhk", x, params["attn"]["q"])).mean()
    >>> x = jax.random.normal(jax.random.key(1), (8, 16))
    >>> phi, start = hora_jax.joint_a(plan, loss, params, hora_jax.init(plan), [x])
    >>> phi["attn"]["a.q"].shape
    (1, 2, 16)
    """
    adapter.check(plan, phi)
    adapter.weights(plan, params)
    check_function(loss)
    trained = [
        f"{key}.{name}" for key, own in phi.items() for name, v in own.items() if _of_b(name) and bool(jnp.any(v))
    ]
    if trained:
        raise HoraError(f"A starts before training, got {trained}, which are not zero: take hora_jax.init (spec I7)")
    trial = _Trial(plan, loss, params, few(batches), oversample)
    start = joint_start(
        {name: (layer.spec, layer.shape) for layer in plan.layers for name in layer.names},
        Measure(trial.left, trial.right, trial.inputs),
        of=of,
        scale=scale,
        together=together,
        power=power,
        oversample=oversample,
        seed=seed,
    )
    result = {key: dict(own) for key, own in phi.items()}
    for key, members in plan.groups().items():
        names = [name for layer in members for name in layer.names]
        for param in start.params[names[0]]:
            stacked = np.stack([start.params[name][param] for name in names])
            result[key][param] = jnp.asarray(stacked, phi[key][param].dtype)
    return result, start


class _Trial:
    """Passes over the batches with probes for factors."""

    def __init__(self, plan: Plan, loss: Loss, params: Any, batches: Sequence[Any], oversample: int) -> None:
        self.base, self.loss, self.params, self.batches, self.scale = plan, loss, params, batches, LOSS_SCALE
        self.oversample = oversample

    @cached_property
    def plan(self) -> Plan:
        """Adapters of LoRA's form, as wide as the probes."""
        wider = [replace(x, spec=AdapterSpec(x.spec.rank + self.oversample, sharing="a")) for x in self.base.layers]
        return Plan(tuple(wider))

    @cached_property
    def gradients(self) -> Any:
        """Of all factors."""
        return _gradients(Adapted(self.loss, self.plan, "branch", "error"))

    @cached_property
    def moments(self) -> Any:
        """What products see, in place of gradients."""
        return _gradients(Adapted(self.loss, self.plan, "observe", "error"))

    def left(self, probes: Probes) -> Probes:
        """``P^T G``: gradients of A where B is P and A zero."""
        found = self._differentiated("b", probes)
        return self._named(probes, found, lambda a, b, probe: a[: probe.shape[1]])

    def right(self, probes: Probes) -> Probes:
        """``G Q^T``: gradients of B where A is Q and B zero."""
        found = self._differentiated("a", probes)
        return self._named(probes, found, lambda a, b, probe: b.reshape(-1, b.shape[-1])[:, : len(probe)])

    def inputs(self, probes: Probes) -> dict[str, dict[str, Moments]]:
        """``Q E[x x^T]`` and ``E[x^T x]``, both times the number of tokens."""
        found = self._measured(self.moments, "a", probes, 1.0)
        return self._named(probes, found, lambda a, b, probe: Moments(a[: len(probe)], float(b.flat[0])))

    def _differentiated(self, factor: str, probes: Probes) -> dict[str, dict[str, np.ndarray]]:
        """As `_measured`, at a scale of the loss at which no product leaves float16's range."""
        while True:
            found = self._measured(self.gradients, factor, probes, self.scale)
            if self.scale == 1 or all(np.isfinite(value).all() for own in found.values() for value in own.values()):
                return found
            self.scale = max(1.0, self.scale / 16)

    def _measured(self, gradients: Any, factor: str, probes: Probes, scale: float) -> dict[str, dict[str, np.ndarray]]:
        """Mean gradients of all factors, by layer name, where one factor is the probes and the other zero."""
        phi = {}
        for key, members in self.plan.groups().items():
            names, rank = [name for layer in members for name in layer.names], members[0].spec.rank
            phi[key] = {}
            for p, shape in members[0].shape.items():
                zeros = {
                    "a": np.zeros((len(names), rank, shape.embed_dim), np.float32),
                    "b": np.zeros((len(names), shape.num_heads, shape.head_dim, rank), np.float32),
                }
                for i, name in enumerate(names):
                    probe = np.asarray(probes[name][p])
                    if factor == "a":
                        zeros["a"][i, : len(probe)] = probe
                    else:
                        zeros["b"][i, ..., : probe.shape[1]] = probe.reshape(shape.num_heads, shape.head_dim, -1)
                phi[key] |= {f"a.{p}": jnp.asarray(zeros["a"]), f"b.{p}": jnp.asarray(zeros["b"])}
        total = None
        for batch in self.batches:
            grads = gradients(self.params, phi, batch, scale)
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        mean = jax.tree.map(lambda value: on_host(value).astype(np.float64) / (scale * len(self.batches)), total)
        return {
            name: {param: value[i] for param, value in mean[key].items()}
            for key, members in self.plan.groups().items()
            for i, name in enumerate(name for layer in members for name in layer.names)
        }

    def _named(self, probes: Probes, found: Mapping[str, Mapping[str, np.ndarray]], take: Callable[..., Any]) -> Any:
        return {
            name: {p: take(found[name][f"a.{p}"], found[name][f"b.{p}"], probe) for p, probe in own.items()}
            for name, own in probes.items()
        }


def _gradients(adapted: Adapted) -> Any:
    def value(phi: Any, params: Any, batch: Any, scale: Any) -> jax.Array:
        return adapted(params, phi, batch) * scale

    return jax.jit(lambda params, phi, batch, scale: jax.grad(value)(phi, params, batch, scale))


def _of_b(name: str) -> bool:
    return name.partition(".")[0] in ("b", "b_out")
