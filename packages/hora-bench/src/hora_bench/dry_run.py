"""What a run would cost, from abstract weights: parameters and FLOPs counted, memory as an estimate."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Final

from hora_spec import HoraError

from hora_bench import methods
from hora_bench.methods import Method
from hora_bench.models import load
from hora_bench.request import Request

GIB: Final = 2**30
RESPONSE_TOKENS: Final = 8  # of an answer with its end token, rounded up as batches do


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One optimiser step of a transformer: what it reads, and the widths that decide its activations.

    Attributes
    ----------
    batch_size, seq
        Sequences (or images) in a step, and their tokens (or patches).
    depth, embed, mlp, heads
        Of the transformer; `mlp` is the width that is kept twice (gate and up) or once in two forms (before and
        after GELU).
    outputs
        Logits of one sequence or image.
    """

    batch_size: int
    seq: int
    depth: int
    embed: int
    mlp: int
    heads: int
    outputs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What abstract weights tell exactly.

    Attributes
    ----------
    params_count, trained_count
        All parameters, and those that are trained.
    step_flops
        Floating-point operations of forward and backward on all devices together.
    counted_by
        Who counted them.
    """

    params_count: int
    trained_count: int
    step_flops: float
    counted_by: str


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device: frozen weights; trained weights with gradient and moments; what the backward pass keeps."""

    frozen_bytes: float
    trained_bytes: float
    activation_bytes: float

    @property
    def total_bytes(self) -> float:
        """The sum."""
        return self.frozen_bytes + self.trained_bytes + self.activation_bytes


def memory(
    counts: Counts,
    work: Workload,
    *,
    mesh: dict[str, int],
    frozen_itemsize: int,
    itemsize: int,
    recomputed: bool,
) -> Memory:
    """An estimate of a device's memory.

    Frozen weights are divided by both axes of the mesh, batches by fsdp. Trained weights, gradient and two moments are
    float32 on every device. Activations are the residual stream of every layer and the insides of every layer, of one
    where they are recomputed.
    """
    fsdp, tp = (mesh.get(axis, 1) for axis in ("fsdp", "tp"))
    rows = work.batch_size / fsdp
    inside = 4 * work.embed + 2 * work.mlp / tp + 2 * work.heads * work.seq / tp
    kept = rows * work.seq * itemsize * (work.depth * work.embed + inside * (1 if recomputed else work.depth))
    frozen = (counts.params_count - counts.trained_count) * frozen_itemsize / (fsdp * tp)
    return Memory(frozen, 16 * counts.trained_count, kept + 4 * rows * work.outputs)


def plan(console: Any, asked: Request, *, architecture: dict[str, Any] | None, num_classes: int | None) -> None:
    """Print parameters, FLOPs and memory per device.

    HoRA and full fine-tuning of language models on JAX are counted by XLA, everything else by torch; the numbers of
    a method depend little on the framework.

    Parameters
    ----------
    console
        Where it is printed.
    asked
        The run.
    architecture
        The Hugging Face configuration of a model that is not here, or None.
    num_classes
        Of a task of images or sentences; None for text.

    Raises
    ------
    HoraError
        The model's configuration is not here, or the method cannot be counted.
    """
    method = methods.find(asked.method).configured(asked.options)
    if method.family == "vblora":
        raise HoraError(
            "--dry-run counts methods on weights without values, got vblora, whose forward looks at its values: "
            "run a few steps of a small model instead"
        )
    classified, mesh = asked.kind != "text", asked.mesh or {}
    if asked.kind == "images":
        counts, work = _vit(asked, method, num_classes or 0)
    elif classified:
        counts, work = _encoder(asked, method, num_classes or 0)
    else:
        stored = architecture or _stored_config(asked.model)
        work = _text_workload(stored, asked.batch_size)
        by_xla = asked.backend == "jax" and method.family in ("hora", "full")
        count = partial(llama_by_xla, dtype=asked.dtype) if by_xla else llama_by_torch
        counts = count(stored, method, work)
    half = 2 if asked.dtype == "bfloat16" else 4
    # images and sentences are multiplied in bfloat16 with weights that stay float32
    found = memory(
        counts, work, mesh=mesh, frozen_itemsize=4 if classified else half, itemsize=half, recomputed=asked.remat
    )
    devices, share = prod(mesh.values()), 100 * counts.trained_count / counts.params_count
    form = f"{devices} devices ({', '.join(f'{axis} {size}' for axis, size in mesh.items())})" if mesh else "1 device"
    console.print(f"[bold]{asked.model}, {method.name}[/bold], {form}, {asked.dtype}", highlight=False)
    console.print(f"parameters: {counts.params_count:,}, trained {counts.trained_count:,} ({share:.4f} %)")
    console.print(
        f"one step of {work.batch_size} x {work.seq} tokens: {counts.step_flops / 1e12:.2f} TFLOP, "
        f"{counts.step_flops / devices / 1e12:.2f} a device, counted by {counts.counted_by}"
    )
    console.print(f"memory per device: {found.total_bytes / GIB:.2f} GiB, of it")
    for part, size in (
        ("frozen weights", found.frozen_bytes),
        ("trained weights, gradient and moments", found.trained_bytes),
        (f"activations, estimated{', recomputed' * asked.remat}", found.activation_bytes),
    ):
        console.print(f"  {part}: {size / GIB:.2f}")


def _vit(asked: Request, method: Method, num_classes: int) -> tuple[Counts, Workload]:
    import torch

    size = asked.image_size_px or 0
    model = load.abstract_vit(asked.model, size, num_classes)
    block = model.blocks[0]
    work = Workload(
        batch_size=asked.batch_size,
        seq=model.patch_embed.num_patches + model.num_prefix_tokens,
        depth=len(model.blocks),
        embed=model.embed_dim,
        mlp=block.mlp.fc1.out_features,
        heads=block.attn.num_heads,
        outputs=model.num_classes,
    )
    image = torch.zeros(asked.batch_size, size, size, 3, device="meta")
    return _by_torch(model, method, {"image": image}), work


def _encoder(asked: Request, method: Method, num_classes: int) -> tuple[Counts, Workload]:
    import torch

    model = load.abstract_sentence_classifier(asked.model, num_classes)
    work = replace(_text_workload(model.config.to_dict(), asked.batch_size), outputs=num_classes)
    whole = torch.zeros(work.batch_size, work.seq, dtype=torch.long, device="meta")
    # transformers 5.23 looks whether a mask hides anything, and abstract tensors have no values
    unmasked = {"attention_mask": None}
    model.encoder.register_forward_pre_hook(lambda _, args, given: (args, {**given, **unmasked}), with_kwargs=True)
    return _by_torch(model, method, {"tokens": whole, "valid": whole, "types": whole}), work


def _text_workload(stored: dict[str, Any], batch_size: int) -> Workload:
    from hora_bench.data.records import CUTOFF

    return Workload(
        batch_size=batch_size,
        seq=CUTOFF,
        depth=stored["num_hidden_layers"],
        embed=stored["hidden_size"],
        mlp=stored["intermediate_size"],
        heads=stored["num_attention_heads"],
        outputs=RESPONSE_TOKENS * stored["vocab_size"],
    )


def _stored_config(model: str) -> dict[str, Any]:
    found = load.resolve(model)
    if not isinstance(found, Path) or not (found / "config.json").exists():
        raise HoraError(f"--dry-run needs a configuration, got the name {model!r}: pass --config or a directory")
    return json.loads((found / "config.json").read_text())


def llama_by_torch(architecture: dict[str, Any], method: Method, work: Workload) -> Counts:
    """Counts of one step of a language model with the architecture of a Hugging Face ``config.json``."""
    import torch

    model = load.abstract_causal_lm(architecture)
    picked = torch.zeros(work.batch_size, work.outputs // architecture["vocab_size"], dtype=torch.long, device="meta")
    tokens = torch.zeros(work.batch_size, work.seq, dtype=torch.long, device="meta")
    # without a mask transformers 5.23 looks for packed sequences in values, and abstract tensors have none
    masked = {"attention_mask": torch.ones_like(tokens)}
    model.base_model.register_forward_pre_hook(lambda _, args, given: (args, {**given, **masked}), with_kwargs=True)
    return _by_torch(model, method, {"tokens": tokens, "at": picked})


def _by_torch(model: Any, method: Method, batch: dict[str, Any]) -> Counts:
    """Counts on the meta device, under torch's FLOP counter."""
    import torch

    from hora_bench.backends.torch import Logits
    from hora_bench.backends.torch_methods import prepare
    from hora_bench.experiments.cost.counted import counter

    with torch.device("meta"):
        adapted = Logits(prepare(model, method, seed=0)).train()
    with counter() as counted:
        adapted(batch).sum().backward()
    named = [(name, p) for name, p in adapted.named_parameters() if ".original_module." not in name]
    return Counts(
        params_count=sum(p.numel() for _, p in named),
        trained_count=sum(p.numel() for _, p in named if p.requires_grad),
        step_flops=float(counted.get_total_flops()),
        counted_by="torch",
    )


def llama_by_xla(architecture: dict[str, Any], method: Method, work: Workload, *, dtype: str) -> Counts:
    """Counts of one step of a language model, by XLA's own analysis of the program that would run.

    Parameters
    ----------
    architecture, method
        What is trained how; the method is of the family hora or full, qwix needs real weights.
    work
        Of the step.
    dtype
        Of the frozen weights and activations.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from hora_bench.backends.jax import loss_of
    from hora_bench.backends.jax_methods import prepare
    from hora_bench.models.llama import Llama, LlamaConfig

    config = LlamaConfig.from_hf(architecture)
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
