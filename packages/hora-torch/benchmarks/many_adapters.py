"""Many adapters on one base, HoRA beside PEFT's LoRA: time of a token and memory of an adapter.

    python many_adapters.py [--counts 1 8 64] [--layers 30] [--repeats 15] [--rank 8] [--json FILE]

The model has the shape of SmolLM2-135M, or fewer layers of it. "one" is a batch of one adapter, switched before each
token; "mixed" is a batch of eight samples that name their adapters, as many different ones as there are up to eight.
Times are of one thread, sides in turns, ratios to LoRA with an interval. HoRA is measured as trained, in
`cached_factors`, and frozen; the control is a second LoRA: as far as its ratio is off 1, the machine is.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import compare
import peft
import torch
import transformers
from hora_torch import HoraConfig, cached_factors, freeze
from torch import nn

BATCH = 8
SIDES = ("lora", "control", "hora", "cached", "frozen")


def model_of(side: str, count: int, rank: int, layers: int) -> nn.Module:
    """The base with `count` adapters that differ."""
    torch.manual_seed(0)
    base, targets, _ = compare.smollm()
    base.model.layers = base.model.layers[:layers]
    base.config.num_hidden_layers = layers
    kinds = {"r": rank, "target_modules": list(targets)}
    configs = (
        peft.LoraConfig(lora_alpha=rank, init_lora_weights=False, **kinds)
        if side in ("lora", "control")
        else HoraConfig(init_weights=False, seed=number, **kinds)
        for number in range(count)
    )
    model = peft.get_peft_model(base, next(configs), adapter_name="adapter0")
    for number, config in enumerate(configs, 1):
        model.add_adapter(f"adapter{number}", config)
    if side == "frozen":
        for number in range(count):
            freeze(model, f"adapter{number}")
    return model.eval()


def adapter_bytes(model: nn.Module, name: str) -> int:
    """Bytes of the parameters of one adapter."""
    return sum(
        param.nbytes
        for key, param in model.named_parameters()
        if f".{name}." in key and (".lora_" in key or ".hora_" in key)
    )


@torch.no_grad()
def tokens(model: nn.Module, count: int) -> dict[str, Callable[[], None]]:
    """Decoding of one token with 64 in the cache, for both kinds of batch."""
    steps = {}
    for kind, batch in (("one", 1), ("mixed", BATCH)):
        cache, ids = transformers.DynamicCache(), torch.randint(0, 49152, (batch, 64))
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        names = itertools.cycle(f"adapter{number}" for number in range(count))
        mixed = {"adapter_names": [f"adapter{number % count}" for number in range(batch)]} if kind == "mixed" else {}

        def step(kind=kind, cache=cache, ids=ids, names=names, mixed=mixed) -> None:
            if kind == "one" and count > 1:
                model.set_adapter(next(names))
            with torch.no_grad():
                model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True, **mixed)
            cache.crop(-1)

        steps[kind] = step
    return steps


def rows(counts: list[int], repeats: int, rank: int, layers: int) -> Iterator[dict[str, Any]]:
    """One measurement for each number of adapters: both kinds of batch, and the bytes of an adapter."""
    for count in counts:
        models = {side: model_of(side, count, rank, layers) for side in SIDES}
        row: dict[str, Any] = {"layers_count": layers, "adapters_count": count, "repeats_count": repeats}
        with ExitStack() as scopes:
            scopes.enter_context(cached_factors(models["cached"]))
            steps = {side: tokens(model, count) for side, model in models.items()}
            for kind in ("one", "mixed"):
                compare.medians({side: steps[side][kind] for side in SIDES}, repeats)
                row[kind] = compare.against_lora(compare.rounds)
        yield row | {"adapter_bytes": {side: adapter_bytes(model, "adapter0") for side, model in models.items()}}


def main() -> None:
    """Measure, print, and store where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options, _ = parser.parse_known_args()  # `nox -s bench` hands its options to all scripts
    torch.set_num_threads(1)
    for row in rows(options.counts, options.repeats, options.rank, options.layers):
        if options.json:
            store(row, options.json, options.rank)
        shown = {side: [row[kind][side]["cpu"] for kind in ("one", "mixed")] for side in SIDES}
        for side, (one, mixed) in shown.items():
            times = "  ".join(f"{1e3 * of['median_s']:7.1f} ms, {of['ratio']:.2f} of LoRA" for of in (one, mixed))
            print(f"{row['adapters_count']:3d} adapters  {side:8}{times}  {row['adapter_bytes'][side]} B", flush=True)


def store(row: dict[str, Any], path: Path, rank: int) -> None:
    """Put a row in the place of an earlier one of as many adapters on as many layers."""
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = {(one["layers_count"], one["adapters_count"]): one for one in (*earlier, row)}
    results = compare.machine() | {"rank": rank, "rows": [kept[key] for key in sorted(kept)]}
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
