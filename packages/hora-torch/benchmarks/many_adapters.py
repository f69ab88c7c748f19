"""Many adapters on one base, HoRA beside PEFT's LoRA: time of a token and memory of an adapter.

    python many_adapters.py [--counts 1 8 64] [--repeats 15] [--rank 8]

The model has the shape of SmolLM2-135M. "one" is a batch of one adapter, switched before each token; "mixed" is a batch
of eight samples that name their adapters, as many different ones as there are up to eight. Times are medians of
processor milliseconds on one thread, sides in turns. HoRA is measured as trained, in `cached_factors`, and frozen.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import compare
import peft
import torch
import transformers
from hora_torch import HoraConfig, cached_factors, freeze
from torch import nn

BATCH = 8
SIDES = ("LoRA", "HoRA", "HoRA, cached", "HoRA, frozen")


def model_of(side: str, count: int, rank: int) -> nn.Module:
    """The base with `count` adapters that differ."""
    torch.manual_seed(0)
    base, targets, _ = compare.smollm()
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


def rows(counts: list[int], repeats: int, rank: int) -> Iterator[tuple[str, ...]]:
    """Lines of the table."""
    for count in counts:
        models = {side: model_of(side, count, rank) for side in SIDES}
        with ExitStack() as scopes:
            scopes.enter_context(cached_factors(models["HoRA, cached"]))
            steps = {side: tokens(model, count) for side, model in models.items()}
            times = {
                kind: compare.medians({side: steps[side][kind] for side in SIDES}, repeats) for kind in ("one", "mixed")
            }
        for side, model in models.items():
            yield (
                str(count),
                side,
                *(f"{1e3 * times[kind][side]:.1f}" for kind in ("one", "mixed")),
                f"{adapter_bytes(model, 'adapter0') / 1e6:.2f}",
            )


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rank", type=int, default=8)
    options, _ = parser.parse_known_args()  # `nox -s bench` hands its options to all scripts
    torch.set_num_threads(1)
    compare.clock = time.process_time
    print("| adapters | method | one, ms a token | mixed, ms a step | MB an adapter |")
    print("|---|---|---|---|---|")
    for row in rows(options.counts, options.repeats, options.rank):
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
