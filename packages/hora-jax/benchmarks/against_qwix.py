"""Training steps of HoRA, qwix LoRA and the frozen base on the same NNX models, side by side in one process.

    python packages/hora-jax/benchmarks/against_qwix.py [--small] [--rounds N] [--clock wall|cpu] [--json FILE]

All variants run the same step: loss, gradient, Adam, donated buffers. `frozen` differentiates with respect to one
scale at the bottom, so that it pays for the whole backward pass and nothing else. `qwix` is LoRA with an A per
adapted kernel: on LLaMA q_proj and v_proj, on ViT the fused qkv. `scan` is HoRA on the model with scanned layers, where
qwix cannot keep its parameters; XLA counts the FLOPs of a scan's body once. Step times are medians over interleaved
rounds, start times CPU seconds of all threads; FLOPs and bytes are those of the compiled program.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import hora_jax
import jax
import jax.numpy as jnp
import optax
import qwix
from flax import nnx
from hora_bench.models.llama import Llama, LlamaConfig
from hora_bench.models.vit import ViT, ViTConfig
from hora_jax import presets
from hora_jax.nnx import HoraModel, HoraParam
from hora_spec import AdapterSpec

RANK = 8


@dataclass(frozen=True, slots=True)
class Workload:
    """A model, its input, and how each method finds its projections."""

    name: str
    make: Callable[..., nnx.Module]  # make(scan=...)
    inputs: jax.Array
    targets: tuple[hora_jax.Target, ...]
    qwix_path: str
    bottom: str  # parameter whose gradient needs the whole backward pass


@dataclass(frozen=True, slots=True)
class Result:
    """What one variant costs."""

    workload: str
    variant: str
    trainable_count: int
    attach_s: float
    trace_s: float
    compile_s: float
    step_s: float
    flops: float
    peak_memory_bytes: int
    hlo_lines: int


def workloads(small: bool) -> list[Workload]:
    """LLaMA with grouped queries, and ViT."""
    scale = 4 if small else 1
    llama = LlamaConfig(
        vocab_size=4096 // scale,
        hidden_size=512 // scale,
        intermediate_size=1408 // scale,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64 // scale,
    )
    vit = ViTConfig(
        image_size=112,
        patch_size=8,
        embed_dim=384 // scale,
        depth=12,
        num_heads=6,
        mlp_dim=1536 // scale,
        num_classes=10,
    )
    tokens = jax.random.randint(jax.random.key(0), (4, 256 // scale), 0, llama.vocab_size)
    images = jax.random.normal(jax.random.key(0), (8 // scale, 112, 112, 3))
    return [
        Workload(
            "llama",
            lambda scan: Llama(llama.replace(scan_layers=scan), rngs=nnx.Rngs(0)),
            tokens,
            presets.llama(),
            ".*(q_proj|v_proj)",
            "model.layers.0.input_layernorm.scale",
        ),
        Workload(
            "vit",
            lambda scan: ViT(vit.replace(scan_layers=scan), rngs=nnx.Rngs(0)),
            images,
            presets.vit(),
            ".*qkv",
            "blocks.0.norm1.scale",
        ),
    ]


def attach_hora(base: nnx.Module, workload: Workload) -> tuple[nnx.Module, Any]:
    plan = hora_jax.make_plan(base, AdapterSpec(RANK), workload.targets)
    return HoraModel(base, plan, hora_jax.init(plan)), HoraParam


def attach_qwix(base: nnx.Module, workload: Workload) -> tuple[nnx.Module, Any]:
    provider = qwix.LoraProvider(module_path=workload.qwix_path, rank=RANK, alpha=float(RANK))
    return qwix.apply_lora_to_model(base, provider, workload.inputs, rngs=nnx.Rngs(0)), nnx.LoRAParam


def attach_nothing(base: nnx.Module, workload: Workload) -> tuple[nnx.Module, Any]:
    return base, lambda path, _: ".".join(map(str, path)) == workload.bottom


VARIANTS = {"frozen": attach_nothing, "qwix": attach_qwix, "hora": attach_hora, "scan": attach_hora}


class Trainer:
    """One variant, compiled, with its state."""

    def __init__(self, workload: Workload, variant: str) -> None:
        base = workload.make(scan=variant == "scan")
        jax.block_until_ready(jax.tree.leaves(nnx.state(base)))
        start = time.process_time()
        model, trainable = VARIANTS[variant](base, workload)
        graph, self.params, self.rest = nnx.split(model, trainable, ...)
        jax.block_until_ready(jax.tree.leaves(self.params))
        self.attach_s = time.process_time() - start

        optimizer = optax.adam(1e-4)
        self.state = jax.jit(optimizer.init)(self.params)

        def step(params: Any, state: Any, rest: Any, inputs: jax.Array) -> tuple[Any, Any, jax.Array]:
            def loss(params: Any) -> jax.Array:
                return jnp.mean(jnp.square(nnx.merge(graph, params, rest)(inputs)))

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        self.inputs = workload.inputs
        start = time.process_time()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(self.params, self.state, self.rest, self.inputs)
        self.trace_s = time.process_time() - start
        start = time.process_time()
        self.compiled = lowered.compile()
        self.compile_s = time.process_time() - start

    def step(self, clock: Callable[[], float]) -> float:
        """Seconds of one step."""
        start = clock()
        self.params, self.state, loss = self.compiled(self.params, self.state, self.rest, self.inputs)
        loss.block_until_ready()
        return clock() - start

    def result(self, workload: str, variant: str, times: list[float]) -> Result:
        """The numbers, `times` without the first, cold step."""
        memory = self.compiled.memory_analysis()
        return Result(
            workload=workload,
            variant=variant,
            trainable_count=sum(leaf.size for leaf in jax.tree.leaves(self.params)),
            attach_s=self.attach_s,
            trace_s=self.trace_s,
            compile_s=self.compile_s,
            step_s=median(times),
            flops=self.compiled.cost_analysis()["flops"],
            peak_memory_bytes=memory.temp_size_in_bytes
            + memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes,
            hlo_lines=self.compiled.as_text().count("\n"),
        )


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(workload: Workload, rounds: int, variants: list[str], clock: str) -> list[Result]:
    """All variants, their steps interleaved."""
    trainers = {variant: Trainer(workload, variant) for variant in variants}
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds + 1):
        for variant, trainer in trainers.items():
            times[variant].append(trainer.step(CLOCKS[clock]))
    return [trainer.result(workload.name, variant, times[variant][1:]) for variant, trainer in trainers.items()]


def table(results: list[Result]) -> str:
    """Ratios to qwix LoRA and to the frozen base, as Markdown."""
    lines = [
        "| model | variant | params | step ms | / qwix | / frozen | GFLOP | / qwix | MiB | / qwix | start s | / qwix |",
        "|" + "---|" * 12,
    ]
    by = {(result.workload, result.variant): result for result in results}
    for r in results:
        lora, frozen = by[r.workload, "qwix"], by[r.workload, "frozen"]
        start, lora_start = (x.attach_s + x.trace_s + x.compile_s for x in (r, lora))
        cells = (
            r.workload,
            r.variant,
            f"{r.trainable_count:,}",
            f"{1e3 * r.step_s:.0f}",
            f"{r.step_s / lora.step_s:.3f}",
            f"{r.step_s / frozen.step_s:.3f}",
            f"{r.flops / 1e9:.2f}",
            f"{r.flops / lora.flops:.4f}",
            f"{r.peak_memory_bytes / 2**20:.1f}",
            f"{r.peak_memory_bytes / lora.peak_memory_bytes:.4f}",
            f"{start:.1f} ({r.attach_s:.1f} + {r.trace_s:.1f} + {r.compile_s:.1f})",
            f"{start / lora_start:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a quarter of the width and tokens, for a first look")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="of steps; cpu where a machine is shared")
    parser.add_argument("--only", help="one workload")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    jax.jit(lambda x: x @ x)(jnp.ones((8, 8))).block_until_ready()  # start-up is nobody's cost
    results = []
    for workload in workloads(args.small):
        if args.only in (None, workload.name):
            results += measure(workload, args.rounds, list(VARIANTS), args.clock)
    print(table(results))
    if args.json:
        about = {"jax": jax.__version__, "qwix": qwix.__version__, "device": jax.devices()[0].device_kind}
        about |= {"machine": platform.machine(), "rank": RANK, "small": args.small}
        about |= {"rounds": args.rounds, "clock": args.clock}
        args.json.write_text(json.dumps({**about, "results": [asdict(r) for r in results]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
