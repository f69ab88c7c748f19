"""A batch whose rows have adapters of their own, forward: `adapt_each` beside one adapter, and a merged model per row.

    python packages/hora-jax/benchmarks/each_row.py [--small] [--rounds N] [--clock wall|cpu] [--json FILE]

All variants run the same LLaMA, whose queries and values are adapted, on the same tokens. `base` has no adapter, `one`
the same adapter for all rows, `each` one for each of them through `adapt_each`, `merged` a copy of the adapted weights
for each row. Times are medians over interleaved rounds; FLOPs and bytes are those of the compiled program.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import hora_jax
import jax
import jax.numpy as jnp
from flax import nnx
from hora_bench.models.llama import Llama, LlamaConfig
from hora_jax import presets
from hora_spec import AdapterSpec

RANK = 8
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
VARIANTS = ("base", "one", "each", "merged")


def variants(small: bool, rows: int, seq: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Each variant's compiled function and its arguments."""
    scale = 4 if small else 1
    config = LlamaConfig(
        vocab_size=2048 // scale,
        hidden_size=512 // scale,
        intermediate_size=1408 // scale,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64 // scale,
    )
    model = Llama(config, rngs=nnx.Rngs(0))
    plan = hora_jax.make_plan(model, AdapterSpec(RANK), presets.llama())
    graph, params = nnx.split(model)
    tokens = jax.random.randint(jax.random.key(0), (rows, seq), 0, config.vocab_size)
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    start = hora_jax.init(plan)
    phis = jax.tree.map(lambda v: v + 0.01 * jax.random.normal(next(keys), (rows, *v.shape)), start)
    phi = jax.tree.map(lambda v: v[0], phis)

    def batch(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(tokens)

    def row(params: Any, tokens: jax.Array) -> jax.Array:
        return batch(params, tokens[None])[0]

    merge = jax.jit(jax.vmap(lambda phi: hora_jax.weights(plan, hora_jax.merge(plan, params, phi))))
    merged = jax.block_until_ready(merge(phis))

    def by_row(params: Any, merged: Any, tokens: jax.Array) -> jax.Array:
        return jax.vmap(lambda own, tokens: row(hora_jax.replace_weights(params, own), tokens))(merged, tokens)

    calls = {
        "base": (batch, (params, tokens)),
        "one": (hora_jax.adapt(batch, plan, route="branch"), (params, phi, tokens)),
        "each": (hora_jax.adapt_each(row, plan), (params, phis, tokens)),
        "merged": (by_row, (params, merged, tokens)),
    }
    compiled = {name: (jax.jit(fn).lower(*args).compile(), args) for name, (fn, args) in calls.items()}
    each, apart = (jax.block_until_ready(compiled[name][0](*compiled[name][1])) for name in ("each", "merged"))
    scale_of = float(jnp.abs(apart).max())
    assert float(jnp.abs(each - apart).max()) < 1e-4 * scale_of, "each row computes with its own adapter"
    return compiled


def measure(small: bool, rows: int, seq: int, rounds: int, clock: str) -> list[dict[str, Any]]:
    """All variants, their calls interleaved."""
    compiled, now = variants(small, rows, seq), CLOCKS[clock]
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(rounds + 1):
        for name, (fn, args) in compiled.items():
            start = now()
            jax.block_until_ready(fn(*args))
            times[name].append(now() - start)
    base = jax.tree.leaves(compiled["base"][1])
    found = []
    for name, (fn, args) in compiled.items():
        memory, size = fn.memory_analysis(), sum(leaf.nbytes for leaf in jax.tree.leaves(args))
        found.append(
            {
                "rows": rows,
                "seq": seq,
                "variant": name,
                "call_s": median(times[name][1:]),
                "flops": fn.cost_analysis()["flops"],
                "temporary_bytes": memory.temp_size_in_bytes,
                "adapters_bytes": size - sum(leaf.nbytes for leaf in base),
            }
        )
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Ratios to the base, as Markdown."""
    lines = [
        "| rows x tokens | variant | ms | / base | GFLOP | / base | temporary MiB | adapters MiB |",
        "|" + "---|" * 8,
    ]
    bases = {(r["rows"], r["seq"]): r for r in results if r["variant"] == "base"}
    for r in results:
        base = bases[r["rows"], r["seq"]]
        cells = (
            f"{r['rows']} x {r['seq']}",
            r["variant"],
            f"{1e3 * r['call_s']:.1f}",
            f"{r['call_s'] / base['call_s']:.2f}",
            f"{r['flops'] / 1e9:.2f}",
            f"{r['flops'] / base['flops']:.3f}",
            f"{r['temporary_bytes'] / 2**20:.1f}",
            f"{r['adapters_bytes'] / 2**20:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a quarter of the width, for a first look")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu where a machine is shared")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    results = []
    for rows, seq in ((4, 64), (16, 64), (16, 1)):
        results += measure(args.small, rows, seq, args.rounds, args.clock)
    print(table(results))
    if args.json:
        about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "rank": RANK, "small": args.small}
        about |= {"rounds": args.rounds, "clock": args.clock}
        args.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
