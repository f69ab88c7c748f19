"""Many adapters on one base, HoRA beside PEFT's LoRA: time of a token and memory of an adapter.

    python many_adapters.py [--counts 1 8 64] [--layers 30] [--repeats 15] [--rank 8] [--out many_adapters.json]

The model has the shape of SmolLM2-135M, or fewer layers of it. "one" is a batch of one adapter, switched before each
token; "mixed" is a batch of eight samples that name their adapters, as many different ones as there are up to eight.
Times are medians of processor milliseconds on one thread, sides in turns. HoRA is measured as trained, in
`cached_factors`, and frozen.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import compare
import peft
import torch
import transformers
from hora_torch import HoraConfig, cached_factors, freeze
from torch import nn

BATCH = 8
SIDES = ("LoRA", "HoRA", "HoRA, cached", "HoRA, frozen")


def model_of(side: str, count: int, rank: int, layers: int) -> nn.Module:
    """The base with `count` adapters that differ."""
    torch.manual_seed(0)
    base, targets, _ = compare.smollm()
    base.model.layers = base.model.layers[:layers]
    base.config.num_hidden_layers = layers
    kinds = {"r": rank, "target_modules": list(targets)}
    configs = (
        peft.LoraConfig(lora_alpha=rank, init_lora_weights=False, **kinds)
        if side == "LoRA"
        else HoraConfig(init_weights=False, seed=number, **kinds)
        for number in range(count)
    )
    model = peft.get_peft_model(base, next(configs), adapter_name="adapter0")
    for number, config in enumerate(configs, 1):
        model.add_adapter(f"adapter{number}", config)
    if side == "HoRA, frozen":
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
    """One measurement for each number of adapters and each method."""
    for count in counts:
        models = {side: model_of(side, count, rank, layers) for side in SIDES}
        with ExitStack() as scopes:
            scopes.enter_context(cached_factors(models["HoRA, cached"]))
            steps = {side: tokens(model, count) for side, model in models.items()}
            times = {
                kind: compare.medians({side: steps[side][kind] for side in SIDES}, repeats) for kind in ("one", "mixed")
            }
        for side, model in models.items():
            yield {
                "layers": layers,
                "adapters": count,
                "method": side,
                "one_time_ms": round(1e3 * times["one"][side], 1),
                "mixed_time_ms": round(1e3 * times["mixed"][side], 1),
                "adapter_bytes": adapter_bytes(model, "adapter0"),
            }


def main() -> None:
    """Measure, print, and store where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", type=Path, help="JSON file in which these rows take the place of earlier ones")
    options, _ = parser.parse_known_args()  # `nox -s bench` hands its options to all scripts
    torch.set_num_threads(1)
    compare.clock = time.process_time
    found = []
    for row in rows(options.counts, options.repeats, options.rank, options.layers):
        found.append(row)
        print(json.dumps(row), flush=True)
    if options.out is not None:
        kept = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
        measured = {(row["layers"], row["adapters"]) for row in found}
        found += [row for row in kept if (row["layers"], row["adapters"]) not in measured]
        versions = {name: version(name) for name in ("torch", "peft", "transformers")}
        ordered = sorted(found, key=lambda row: (-row["layers"], row["adapters"]))
        results = {"rank": options.rank, "repeats": options.repeats, "versions": versions, "rows": ordered}
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
