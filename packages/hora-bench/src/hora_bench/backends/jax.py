"""The learner on JAX: one compiled step over the trained variables, the frozen ones passed beside."""

from functools import partial
from pathlib import Path
from typing import Any, final

import hora_jax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from hora_jax import merge
from hora_jax.nnx import HoraFixed, HoraModel
from jax.core import Tracer
from safetensors.numpy import save_file

from hora_bench.backends.jax_methods import Filter
from hora_bench.backends.sharding import make_mesh, replicate, shard_batch, shard_weights
from hora_bench.backends.writing import greedy
from hora_bench.data.base import Batch
from hora_bench.recipe import Recipe
from hora_bench.training import Arrays


def logits_of(model: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """Logits of images ``(batch, classes)``, or of the response's tokens ``(batch, response, vocab)``."""
    if "image" in batch:
        drop = {"paths": batch["paths"]} if "paths" in batch else {}
        return model(batch["image"], **drop).astype(jnp.float32)
    return model(batch["tokens"], at=batch["at"]).astype(jnp.float32)


def loss_of(model: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """Weighted mean cross-entropy, 0 where all weights are."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits_of(model, batch), batch["label"])
    return (each * batch["weight"]).sum() / jnp.maximum(1, batch["weight"].sum())


@final
class JaxLearner:
    """AdamW on the variables that a filter selects.

    Parameters
    ----------
    model, trained
        From `hora_bench.backends.jax_methods.prepare`.
    recipe
        Rates and moments.
    mesh
        Sizes of the axes fsdp and tp, or None for one device.
    device
        That device; None leaves the choice to JAX.
    """

    def __init__(
        self,
        model: Any,
        trained: Filter,
        recipe: Recipe,
        *,
        mesh: dict[str, int] | None = None,
        device: jax.Device | None = None,
    ) -> None:
        self.graph, self.params, self.frozen = nnx.split(model, trained, ...)
        self.mesh = make_mesh(mesh) if mesh else None
        self.device = device or jax.devices()[0]
        if device is not None and not mesh:
            self.params, self.frozen = jax.device_put((self.params, self.frozen), device)
        if self.mesh:
            self.frozen = shard_weights(self.frozen, self.mesh)
            self.params = replicate(self.params, self.mesh)
        self.transform = optax.chain(
            optax.identity() if recipe.clip_norm is None else optax.clip_by_global_norm(recipe.clip_norm),
            optax.scale_by_adam(recipe.beta1, recipe.beta2, recipe.eps),
            optax.add_decayed_weights(recipe.weight_decay),
        )
        self.moments = self.transform.init(self.params)

    @property
    def model(self) -> Any:
        """The model with its present parameters."""
        return nnx.merge(self.graph, self.params, self.frozen)

    @property
    def depth(self) -> int:
        """Number of blocks of a vision transformer."""
        model = self.model
        return (model.base if isinstance(model, HoraModel) else model).config.depth

    @property
    def fixed(self) -> nnx.State:
        """What an adapter holds beside its parameters: an A that is not trained."""
        return nnx.filter_state(self.frozen, HoraFixed)

    @property
    def params_count(self) -> int:
        """Number of trained values."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @property
    def total_params_count(self) -> int:
        """Number of all values, trained and frozen."""
        return self.params_count + sum(leaf.size for leaf in jax.tree.leaves(self.frozen))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files: one process drives all devices of a mesh."""
        return True

    def decided(self, answer: bool) -> bool:
        """The main process's answer, in every process."""
        return answer

    def step(self, batch: Batch, learning_rate: float, step: int) -> float:
        """One optimiser step; the loss before it. A loss that is not finite changes nothing."""
        loss, self.params, self.moments = self._step(
            self.params, self.moments, self.frozen, self._placed(batch), learning_rate
        )
        return float(loss)

    def outputs(self, batch: Batch) -> np.ndarray:
        """Logits ``(rows, classes)`` of images, or summed log-likelihoods ``(rows,)`` of responses."""
        return np.asarray(self._outputs(self.params, self.frozen, self._placed(batch)))

    def write(self, batch: Batch, *, end: int, new_tokens: int, beams: int) -> np.ndarray:
        """Ids ``(rows, new_tokens)``, the likeliest token each time, `end` from the end on; `beams` is 1 here."""
        asked = (self.graph, self.params, self.frozen, batch["tokens"], batch["valid"], end)
        return np.asarray(greedy(*asked, new_tokens=new_tokens))

    def save(self, directory: Path) -> str:
        """Write what was trained into an empty directory, and say in which format."""
        model = self.model
        if isinstance(model, HoraModel):
            head = getattr(model.base, "head", None)
            modules = {"head.weight": head.kernel[...].T, "head.bias": head.bias[...]} if head is not None else {}
            hora_jax.save_adapter(directory, model.plan, model.adapter(), modules=modules)
            return "adapter of PEFT"
        flat = nnx.to_flat_state(self.params)
        save_file(
            {_named(path): np.ascontiguousarray(v.get_value()) for path, v in flat}, directory / "trained.safetensors"
        )
        return "trained variables by their paths in the NNX model"

    def peak_bytes(self, batch: Batch) -> int:
        """Most bytes that a training step holds at once on a device, weights and moments included, as XLA plans it."""
        placed = self._placed(batch)
        lowered = type(self)._step.lower(self, self.params, self.moments, self.frozen, placed, 0.0)
        planned: Any = lowered.compile().memory_analysis()
        reused = planned.alias_size_in_bytes  # arguments that hold results
        held = planned.argument_size_in_bytes + planned.output_size_in_bytes - reused
        return int(held + planned.temp_size_in_bytes)

    def device_peak_bytes(self) -> int:
        """Largest memory in use so far on an accelerator; 0 on CPU."""
        statistics = self.device.memory_stats() or {}
        return int(statistics.get("peak_bytes_in_use", 0))

    def state(self) -> Arrays:
        """Trained parameters and optimiser moments, and the A that does not train: another start may differ in bits."""
        leaves = jax.tree.leaves((self.params, self.moments, self.fixed))
        return {f"leaf.{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}

    def restore(self, state: Arrays) -> None:
        """Go back to an earlier `state`."""
        leaves, tree = jax.tree.flatten((self.params, self.moments, self.fixed))
        new = [jnp.asarray(state[f"leaf.{i}"]) for i in range(len(leaves))]
        self.params, self.moments, fixed = jax.tree.unflatten(tree, new)
        self.frozen = nnx.merge_state(self.frozen, fixed)
        if self.mesh:
            self.params, self.moments = replicate((self.params, self.moments), self.mesh)

    def first_nonfinite(self, batch: Batch) -> str:
        """The first trained parameter, or else the first module in the order of the calls, that is not finite."""
        for path, variable in nnx.to_flat_state(self.params):
            if not jnp.isfinite(variable.get_value()).all():
                return f"first in {'.'.join(map(str, path))}"
        model = _merged(self.model) if isinstance(self.model, HoraModel) else self.model
        found: list[str] = []
        for path, module in nnx.iter_modules(model):
            _watch(module, ".".join(map(str, path)) or "the model", found)
        loss_of(model, self._placed(batch))
        return f"first in the output of {found[0]}" if found else "all parameters and all modules' outputs are finite"

    def _placed(self, batch: Batch) -> Any:
        return shard_batch(batch, self.mesh) if self.mesh else batch

    @partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def _step(self, params: Any, moments: Any, frozen: Any, batch: Any, rate: Any) -> tuple[jax.Array, Any, Any]:
        loss, grads = jax.value_and_grad(lambda p: loss_of(nnx.merge(self.graph, p, frozen), batch))(params)
        updates, new_moments = self.transform.update(grads, moments, params)
        new_params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        good = jnp.isfinite(loss)
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), (new_params, new_moments), (params, moments))
        return loss, *kept

    @partial(jax.jit, static_argnums=0)
    def _outputs(self, params: Any, frozen: Any, batch: Any) -> jax.Array:
        logits = logits_of(nnx.merge(self.graph, params, frozen), batch)
        if "image" in batch:
            return logits
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][..., None], axis=-1)[..., 0]
        return (chosen * batch["weight"]).sum(-1)


def _named(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _merged(model: HoraModel) -> Any:
    """The base with the adapter merged, whether the weights are finite or not."""
    graph, state = nnx.split(model.base)
    return nnx.merge(graph, jax.jit(partial(merge, model.plan))(state, model.adapter()))


def _watch(module: Any, name: str, found: list[str]) -> None:
    """Make a module add its name to a list when it returns something that is not finite."""
    kind = type(module)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = kind.__call__(self, *args, **kwargs)
        arrays = [leaf for leaf in jax.tree.leaves(output) if not isinstance(leaf, Tracer)]
        if not all(jnp.isfinite(array).all() for array in arrays):
            found.append(name)
        return output

    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})
