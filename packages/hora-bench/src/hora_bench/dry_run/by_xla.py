"""Counts of a HoRA method or full fine-tuning on JAX: XLA's own analysis of the program that would run."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hora_bench.backends.jax import loss_of
from hora_bench.backends.jax_methods import prepare
from hora_bench.dry_run.plan import Counts, Workload
from hora_bench.methods import Method
from hora_bench.models.llama import Llama, LlamaConfig


def count_llama(config: LlamaConfig, method: Method, work: Workload, *, dtype: str) -> Counts:
    """Counts of one step of a language model.

    Parameters
    ----------
    config, method
        What is trained how; the method is of the family hora or full, qwix needs real weights.
    work
        Of the step.
    dtype
        Of the frozen weights and activations.
    """
    base = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    adapted, trained = prepare(base, method, seed=0)
    graph, params, frozen = nnx.split(adapted, trained, ...)
    frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), frozen)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)
    picked = jax.ShapeDtypeStruct((work.batch_size, work.outputs // config.vocab_size), jnp.int32)
    batch = {
        "tokens": jax.ShapeDtypeStruct((work.batch_size, work.seq), jnp.int32),
        "at": picked,
        "label": picked,
        "weight": jax.ShapeDtypeStruct(picked.shape, jnp.float32),
    }

    def gradient(params: Any, frozen: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda p: loss_of(nnx.merge(graph, p, frozen), batch))(params)

    analysis = jax.jit(gradient).lower(params, frozen, batch).cost_analysis() or {}
    count, rest = (sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (params, frozen))
    return Counts(
        params_count=count + rest,
        trained_count=count,
        step_flops=float(analysis.get("flops", "nan")),
        counted_by="XLA",
    )
