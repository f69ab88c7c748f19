"""What a run would cost, from abstract weights: parameters and FLOPs exactly, memory as an estimate."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from hora_spec import HoraError

from hora_bench.methods import Method
from hora_bench.methods.jax import prepare
from hora_bench.models import load
from hora_bench.models.llama import Llama, LlamaConfig
from hora_bench.tasks.text import CUTOFF
from hora_bench.training.jax import loss_of

RESPONSE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """Costs of one optimiser step.

    Attributes
    ----------
    params_count, trained_count
        All parameters, and those that are trained.
    step_flops
        Floating-point operations of forward and backward on all devices together, counted by XLA on the program.
    frozen_bytes, trained_bytes, activation_bytes
        Per device: frozen weights; trained weights with gradient and two moments in float32; what the backward pass
        keeps, an estimate: the residual stream of every layer, and one layer's insides, with recomputation.
    """

    params_count: int
    trained_count: int
    step_flops: float
    frozen_bytes: float
    trained_bytes: float
    activation_bytes: float


def plan_llama(
    config: LlamaConfig, method: Method, *, batch_size: int, seq: int, mesh: dict[str, int] | None, dtype: str
) -> Plan:
    """Costs of a language model with a HoRA method or full fine-tuning.

    Parameters
    ----------
    config, method
        What is trained how.
    batch_size, seq
        Sequences in a step and their length in tokens.
    mesh
        Sizes of the axes fsdp and tp: weights are divided by both, batches by fsdp.
    dtype
        Of the frozen weights and activations.

    Raises
    ------
    HoraError
        The method's parameters cannot be made without weights.
    """
    if method.family not in ("hora", "full"):
        raise HoraError(f"--dry-run plans hora methods and full, got {method.name}: see hora-bench cost for the others")
    width = jnp.dtype(dtype)
    base = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    adapted, trained = prepare(base, method, seed=0)
    graph, params, frozen = nnx.split(adapted, trained, ...)
    frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, width), frozen)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)
    picked = jax.ShapeDtypeStruct((batch_size, RESPONSE_TOKENS), jnp.int32)
    batch = {
        "tokens": jax.ShapeDtypeStruct((batch_size, seq), jnp.int32),
        "at": picked,
        "label": picked,
        "weight": jax.ShapeDtypeStruct(picked.shape, jnp.float32),
    }

    def gradient(params: Any, frozen: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda p: loss_of(nnx.merge(graph, p, frozen), batch))(params)

    counted = jax.jit(gradient).lower(params, frozen, batch).cost_analysis() or {}
    flops = float(counted.get("flops", "nan"))
    fsdp, tp = ((mesh or {}).get(axis, 1) for axis in ("fsdp", "tp"))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    rest = sum(leaf.size for leaf in jax.tree.leaves(frozen))
    tokens = batch_size / fsdp * seq
    heads = config.num_attention_heads * seq
    inside = 4 * config.hidden_size + 2 * config.intermediate_size / tp + 2 * heads / tp
    kept = tokens * width.itemsize * (config.num_hidden_layers * config.hidden_size + inside)
    logits = batch_size / fsdp * RESPONSE_TOKENS * config.vocab_size * 4
    return Plan(count + rest, count, flops, rest * width.itemsize / (fsdp * tp), 16 * count / fsdp, kept + logits)


def print_plan(console: Any, given: dict[str, Any], method: Method, mesh: dict[str, int] | None) -> None:
    """Print the plan of a run.

    Parameters
    ----------
    console
        A rich console.
    given
        ``model``, ``architecture`` (a Hugging Face config or None), ``batch_size``, ``dtype``.
    method, mesh
        Of the run.
    """
    config = LlamaConfig.from_hf(given["architecture"] or _stored_config(given["model"]))
    plan = plan_llama(config, method, batch_size=given["batch_size"], seq=CUTOFF, mesh=mesh, dtype=given["dtype"])
    devices = 1
    for size in (mesh or {}).values():
        devices *= size
    gib = 2**30
    total = plan.frozen_bytes + plan.trained_bytes + plan.activation_bytes
    share = 100 * plan.trained_count / plan.params_count
    console.print(f"[bold]{given['model']}[/bold], {method.name}, {devices} devices {mesh or ''}, {given['dtype']}")
    console.print(f"parameters: {plan.params_count:,}, trained {plan.trained_count:,} ({share:.4f} %)")
    console.print(
        f"one step of {given['batch_size']} x {CUTOFF} tokens: {plan.step_flops / 1e12:.2f} TFLOP, "
        f"{plan.step_flops / devices / 1e12:.2f} a device"
    )
    console.print(
        f"memory per device: {total / gib:.2f} GiB = frozen weights {plan.frozen_bytes / gib:.2f} + trained weights, "
        f"gradient and moments {plan.trained_bytes / gib:.2f} + activations with recomputation, estimated, "
        f"{plan.activation_bytes / gib:.2f}"
    )


def _stored_config(model: str) -> dict[str, Any]:
    found = load.resolve(model)
    if not isinstance(found, Path) or not (found / "config.json").exists():
        raise HoraError(f"--dry-run needs a configuration, got the name {model!r}: pass --config or a directory")
    return json.loads((found / "config.json").read_text())
