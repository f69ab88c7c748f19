"""Training steps of HoRA, qwix LoRA and the frozen base on the same NNX models, side by side in one process.

    python packages/hora-jax/benchmarks/against_qwix.py [--small] [--rounds N] [--starts N] [--only NAME] [--json FILE]

All variants run the same step: loss, gradient, Adam, donated buffers. `frozen` differentiates with respect to one
scale at the bottom, so that it pays for the whole backward pass and nothing else. `qwix` is LoRA with an A per
adapted kernel: on LLaMA q_proj and v_proj, on ViT the fused qkv; `control` is the same once more: as far as its ratios
are off 1, the machine is. `hora` is `HoraModel`, `adapt` is `hora_jax.adapt` on the model's state, `equal` is HoRA with
at most as many parameters as qwix LoRA.

Step times are medians over interleaved rounds, in wall and processor seconds, with the 95 % interval of a bootstrap
over rounds; starts are processor seconds of all threads with JAX's caches emptied, medians too; bytes are those of the
compiled program. `planning` is `make_plan` for 126 layers.
"""

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from hora_spec import AdapterSpec, count_params

RANK = 8
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True, slots=True)
class Workload:
    """A model, its input, and how each method finds its projections."""

    name: str
    make: Callable[[], nnx.Module]
    inputs: jax.Array
    targets: tuple[hora_jax.Target, ...]
    qwix_path: str
    bottom: str  # parameter whose gradient needs the whole backward pass


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
            lambda: Llama(llama, rngs=nnx.Rngs(0)),
            tokens,
            presets.llama(),
            ".*(q_proj|v_proj)",
            "model.layers.0.input_layernorm.scale",
        ),
        Workload(
            "vit",
            lambda: ViT(vit, rngs=nnx.Rngs(0)),
            images,
            presets.vit(),
            ".*qkv",
            "blocks.0.norm1.scale",
        ),
    ]


@dataclass(frozen=True)
class Attached:
    """What a method makes of a base: its trainable values, all others, and the model's outputs from both."""

    trainable: Any
    rest: Any
    call: Callable[[Any, Any, jax.Array], jax.Array]


def split(model: nnx.Module, trainable: Any) -> Attached:
    graph, params, rest = nnx.split(model, trainable, ...)
    return Attached(params, rest, lambda params, rest, inputs: nnx.merge(graph, params, rest)(inputs))


def attach_hora(base: nnx.Module, workload: Workload, spec: AdapterSpec | None = None) -> Attached:
    plan = hora_jax.make_plan(base, spec or AdapterSpec(RANK), workload.targets)
    return split(HoraModel(base, plan, hora_jax.init(plan)), HoraParam)


def attach_adapt(base: nnx.Module, workload: Workload) -> Attached:
    plan = hora_jax.make_plan(base, AdapterSpec(RANK), workload.targets)
    graph, state = nnx.split(base)
    adapted = hora_jax.adapt(lambda state, inputs: nnx.merge(graph, state)(inputs), plan)
    return Attached(hora_jax.init(plan), state, lambda phi, state, inputs: adapted(state, phi, inputs))


def attach_equal(base: nnx.Module, workload: Workload) -> Attached:
    """The widest hypernetwork whose parameters are at most those of LoRA."""
    layers = hora_jax.make_plan(base, AdapterSpec(RANK), workload.targets).layers
    kernels = {site.path: site.shape for layer in layers for site in layer.sites}
    allowed = sum(RANK * (rows + columns) for rows, columns in kernels.values())
    specs = (AdapterSpec(RANK, hidden_dim=m, head_embed_dim=m) for m in range(64, 0, -1))
    fits = (spec for spec in specs if sum(count_params(spec, layer.shape) for layer in layers) <= allowed)
    return attach_hora(base, workload, next(fits))


def attach_qwix(base: nnx.Module, workload: Workload) -> Attached:
    provider = qwix.LoraProvider(module_path=workload.qwix_path, rank=RANK, alpha=float(RANK))
    model = qwix.apply_lora_to_model(base, provider, workload.inputs, rngs=nnx.Rngs(0))
    return split(model, nnx.LoRAParam)


def attach_nothing(base: nnx.Module, workload: Workload) -> Attached:
    return split(base, lambda path, _: ".".join(map(str, path)) == workload.bottom)


VARIANTS = {
    "qwix": attach_qwix,
    "control": attach_qwix,
    "hora": attach_hora,
    "adapt": attach_adapt,
    "equal": attach_equal,
    "frozen": attach_nothing,
}


class Trainer:
    """One variant, compiled, with its state and the seconds that this took."""

    def __init__(self, workload: Workload, variant: str) -> None:
        base = workload.make()
        jax.block_until_ready(jax.tree.leaves(nnx.state(base)))
        jax.clear_caches()
        start = time.process_time()
        attached = VARIANTS[variant](base, workload)
        self.params, self.rest, self.inputs = attached.trainable, attached.rest, workload.inputs
        jax.block_until_ready(jax.tree.leaves(self.params))
        self.attach_s = time.process_time() - start

        optimizer = optax.adam(1e-4)
        self.state = jax.jit(optimizer.init)(self.params)

        def step(params: Any, state: Any, rest: Any, inputs: jax.Array) -> tuple[Any, Any, jax.Array]:
            def loss(params: Any) -> jax.Array:
                return jnp.mean(jnp.square(attached.call(params, rest, inputs)))

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        start = time.process_time()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(self.params, self.state, self.rest, self.inputs)
        self.trace_s = time.process_time() - start
        start = time.process_time()
        self.compiled = lowered.compile()
        self.compile_s = time.process_time() - start

    def step(self) -> dict[str, float]:
        """Seconds of one step, by each clock."""
        start = {name: clock() for name, clock in CLOCKS.items()}
        self.params, self.state, loss = self.compiled(self.params, self.state, self.rest, self.inputs)
        loss.block_until_ready()
        return {name: clock() - start[name] for name, clock in CLOCKS.items()}

    def size(self) -> dict[str, Any]:
        """What does not depend on the machine's load."""
        memory = self.compiled.memory_analysis()
        return {
            "trainable_count": sum(leaf.size for leaf in jax.tree.leaves(self.params)),
            "flops": self.compiled.cost_analysis()["flops"],
            "peak_memory_bytes": memory.temp_size_in_bytes
            + memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes,
            "hlo_lines": self.compiled.as_text().count("\n"),
        }


def measure(workload: Workload, rounds: int, starts: int) -> dict[str, dict[str, Any]]:
    """All variants: starts in turn, then their steps, in an order that rotates."""
    trainers: dict[str, Trainer] = {}
    begun: dict[str, list[Trainer]] = {name: [] for name in VARIANTS}
    for _ in range(starts):
        for name in VARIANTS:
            trainers[name] = Trainer(workload, name)
            begun[name].append(trainers[name])
    times: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    order = list(VARIANTS)
    for i in range(rounds + 1):
        for name in order[i % len(order) :] + order[: i % len(order)]:
            times[name].append(trainers[name].step())
    parts = ("attach_s", "trace_s", "compile_s")
    found = {}
    for name, trainer in trainers.items():
        began = {part: median(getattr(t, part) for t in begun[name]) for part in parts}
        whole = [sum(getattr(t, part) for part in parts) for t in begun[name]]
        found[name] = {**trainer.size(), **began, "start_s": median(whole), "starts_s": whole}
        for clock in CLOCKS:
            own, lora = ([t[clock] for t in times[side][1:]] for side in (name, "qwix"))
            found[name] |= {f"step_{clock}_s": median(own), f"step_{clock}": ratio(own, lora)}
    for name in found:
        for key in ("start_s", "peak_memory_bytes", "flops"):
            found[name][f"{key.removesuffix('_s')}_ratio"] = found[name][key] / found["qwix"][key]
    return found


def ratio(own: list[float], lora: list[float]) -> dict[str, Any]:
    """Of medians, with the 95 % interval of a bootstrap over rounds."""
    draw = random.Random(0)
    picks = [draw.choices(range(len(own)), k=len(own)) for _ in range(1000)]
    drawn = sorted(median(own[i] for i in pick) / median(lora[i] for i in pick) for pick in picks)
    return {"ratio": median(own) / median(lora), "ratio_95": [drawn[25], drawn[974]]}


def planning(repeats: int = 9) -> dict[str, float]:
    """Seconds to plan q and v of 126 layers, of an NNX model and of its state's shapes."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=126,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
    )
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    shapes = nnx.to_pure_dict(nnx.state(model))
    heads = {"q": 4, "v": 2}
    targets = [hora_jax.Target(f"model.layers.*.self_attn.{p}_proj.kernel", p, "d (h k)", heads=heads[p]) for p in "qv"]
    sides = {"model_s": (model, presets.llama()), "shapes_s": (shapes, targets)}
    return {name: median(_planned(*side) for _ in range(repeats)) for name, side in sides.items()}


def _planned(tree: Any, targets: Any) -> float:
    start = time.process_time()
    hora_jax.make_plan(tree, AdapterSpec(RANK), targets)
    return time.process_time() - start


def table(name: str, found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Ratios to qwix LoRA, as Markdown."""
    yield f"| {name} | params | step ms | step / qwix | by cpu | start s | / qwix | MiB | / qwix |"
    yield "|" + "---|" * 9
    for variant, r in found.items():
        low, high = r["step_wall"]["ratio_95"]
        cells = (
            variant,
            f"{r['trainable_count']:,}",
            f"{1e3 * r['step_wall_s']:.0f}",
            f"{r['step_wall']['ratio']:.3f} ({low:.3f} to {high:.3f})",
            f"{r['step_cpu']['ratio']:.3f}",
            f"{r['start_s']:.1f} ({r['attach_s']:.1f} + {r['trace_s']:.1f} + {r['compile_s']:.1f})",
            f"{r['start_ratio']:.2f}",
            f"{r['peak_memory_bytes'] / 2**20:.1f}",
            f"{r['peak_memory_bytes_ratio']:.4f}",
        )
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a quarter of the width and tokens, for a first look")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--only", choices=["llama", "vit", "planning"])
    parser.add_argument(
        "--json", type=Path, help="add the results to this file, in place of earlier ones of their name"
    )
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    jax.jit(lambda x: x @ x)(jnp.ones((8, 8))).block_until_ready()  # start-up is nobody's cost
    results: dict[str, Any] = {}
    for workload in workloads(args.small):
        if args.only in (None, workload.name):
            results[workload.name] = measure(workload, args.rounds, args.starts)
            print("\n".join(table(workload.name, results[workload.name])))
    if args.only in (None, "planning"):
        results["planning"] = planning()
        print(results["planning"])
    if args.json:
        about = {"jax": jax.__version__, "qwix": qwix.__version__, "device": jax.devices()[0].device_kind}
        about |= {"machine": platform.machine(), "cores_count": os.cpu_count(), "load_average": os.getloadavg()[0]}
        about |= {"rank": RANK, "small": args.small, "rounds": args.rounds, "starts": args.starts}
        before = json.loads(args.json.read_text())["results"] if args.json.exists() else {}
        every = {**before, **{name: {"about": about, **found} for name, found in results.items()}}
        args.json.write_text(json.dumps({"results": every}, indent=1) + "\n")


if __name__ == "__main__":
    main()
