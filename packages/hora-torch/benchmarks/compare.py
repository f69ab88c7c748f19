"""HoRA beside PEFT's LoRA and the frozen base: time and memory, same model, same batch, one process.

    python compare.py [--only projection step tiny-step decode memory generation merge verify] [--repeats 15]
        [--clock cpu] [--json FILE]

Times are medians of interleaved runs, so that a busy machine slows all sides alike; with ``--clock cpu`` they are
processor seconds, which leave out what other processes take. A ratio below 1 means that HoRA is faster. The file has
both clocks, and of tiny steps and decoding a second LoRA as a control: as far as its ratio is off 1, the machine is.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from hora_bench.torchvision_ops import declare_missing_ops
from torch import Tensor, nn

declare_missing_ops()  # timm imports torchvision, which may be of another kind than torch

import peft  # noqa: E402
import transformers  # noqa: E402
from hora_spec import Layout  # noqa: E402
from hora_torch import HoraConfig, cached_factors, verify  # noqa: E402
from hora_torch.layer import HoraLayer  # noqa: E402
from hora_torch.merging import merged_weight  # noqa: E402

Step = Callable[[], Any]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = "wall"


Times = dict[str, dict[str, list[float]]]  # side and clock to seconds of each round
rounds: Times = {}  # of the last comparison


def medians(sides: Mapping[str, Step], repeats: int) -> dict[str, float]:
    """Median seconds of each side; sides take turns, in an order that rotates."""
    names = list(sides)
    rounds.clear()
    rounds.update({name: {key: [] for key in CLOCKS} for name in names})
    for name in names * 2:
        sides[name]()
    for i in range(repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = {key: read() for key, read in CLOCKS.items()}
            sides[name]()
            for key, read in CLOCKS.items():
                rounds[name][key].append(read() - start[key])
    return {name: statistics.median(times[clock]) for name, times in rounds.items()}


def against_lora(rounds: Times) -> dict[str, Any]:
    """Of each side and clock the median, and its ratio to LoRA's with the 95 % interval of a bootstrap over rounds."""
    draw, found = random.Random(0), {}
    for key in CLOCKS:
        lora = rounds["lora"][key]
        picks = [draw.choices(range(len(lora)), k=len(lora)) for _ in range(1000)]
        for name, times in rounds.items():
            own = times[key]
            ratios = sorted(
                statistics.median(own[i] for i in pick) / statistics.median(lora[i] for i in pick) for pick in picks
            )
            found.setdefault(name, {})[key] = {
                "median_s": statistics.median(own),
                "ratio": statistics.median(own) / statistics.median(lora),
                "ratio_95": [ratios[25], ratios[974]],
            }
    return found


def machine() -> dict[str, Any]:
    """What the times depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores_count": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "threads_count": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
    }


class Attention(nn.Module):
    """One query projection, where both methods find it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_heads = dim // 64
        self.q_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def with_lora(model: nn.Module, rank: int, targets: Iterable[str], **kwargs: Any) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), **kwargs))


def with_hora(model: nn.Module, rank: int, targets: Iterable[str], **kwargs: Any) -> nn.Module:
    return peft.get_peft_model(model, HoraConfig(r=rank, target_modules=list(targets), **kwargs))


def projection(repeats: int) -> Iterator[tuple[str, ...]]:
    """Forward and backward of one projection whose input needs a gradient."""
    for dim in (768, 2048):
        for tokens in (1024, 4096, 8192):
            for rank in (8, 32):
                x = torch.randn(1, tokens, dim, requires_grad=True)
                grad = torch.randn(1, tokens, dim)
                models = {
                    "base": frozen(Attention(dim)),
                    "lora": with_lora(Attention(dim), rank, ["q_proj"]),
                    "hora": with_hora(Attention(dim), rank, ["q_proj"]),
                    "branch": with_hora(Attention(dim), rank, ["q_proj"], route="branch"),
                }
                for model in models.values():
                    model.train()
                got = medians({name: lambda m=m: m(x).backward(grad) for name, m in models.items()}, repeats)
                yield (f"d {dim}, {tokens} tokens, r {rank}", *times(got), f"{got['branch'] / got['lora']:.2f}")


def vit() -> tuple[nn.Module, tuple[str, ...], Callable[[nn.Module], Tensor]]:
    """timm ViT-S/14, batch 32, 98 px."""
    import timm

    model = timm.models.vision_transformer.VisionTransformer(
        img_size=98, patch_size=14, embed_dim=384, depth=12, num_heads=6, num_classes=10
    )
    x, y = torch.randn(32, 3, 98, 98), torch.randint(0, 10, (32,))
    return model, ("qkv",), lambda model: nn.functional.cross_entropy(model(x), y)


def llama() -> tuple[nn.Module, tuple[str, ...], Callable[[nn.Module], Tensor]]:
    """8 layers, 1024 wide, grouped queries 4:1, 4 x 512 tokens."""
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    return of_tokens(config, 4, 512)


def tiny_vit() -> tuple[nn.Module, tuple[str, ...], Callable[[nn.Module], Tensor]]:
    """timm ViT, 4 layers, 192 wide, batch 2, 64 px."""
    import timm

    model = timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=192, depth=4, num_heads=3, num_classes=10
    )
    x, y = torch.randn(2, 3, 64, 64), torch.randint(0, 10, (2,))
    return model, ("qkv",), lambda model: nn.functional.cross_entropy(model(x), y)


def tiny_llama() -> tuple[nn.Module, tuple[str, ...], Callable[[nn.Module], Tensor]]:
    """2 layers, 64 wide, 4 x 16 tokens."""
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return of_tokens(config, 4, 16)


SMOLLM = transformers.LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


def smollm() -> tuple[nn.Module, tuple[str, ...], Callable[[nn.Module], Tensor]]:
    """The shape of SmolLM2-135M, 1 x 16 tokens."""
    return of_tokens(SMOLLM, 1, 16)


def of_tokens(
    config: transformers.LlamaConfig, batch: int, seq: int
) -> tuple[nn.Module, tuple[str, ...], Callable[[nn.Module], Tensor]]:
    ids = torch.randint(0, config.vocab_size, (batch, seq))
    return (
        transformers.LlamaForCausalLM(config),
        ("q_proj", "v_proj"),
        lambda model: model(input_ids=ids, labels=ids, use_cache=False).loss,
    )


MODELS = {"timm ViT-S, batch 32, 98 px": vit, "LLaMA 8 x 1024, GQA 4:1, 4 x 512": llama}
TINY = {
    "LLaMA 2 x 64, 4 x 16": tiny_llama,
    "timm ViT 4 x 192, batch 2, 64 px": tiny_vit,
    "SmolLM2-135M, 1 x 16": smollm,
}


def training_step(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Step:
    """One step of fused AdamW, the Trainer's default, on what is trainable.

    A frozen model back-propagates to its first activations, as LoRA does.
    """
    model.train()
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True) if params else None

    def step() -> None:
        loss(model).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def step(repeats: int) -> Iterator[tuple[str, ...]]:
    """A whole training step. The base trains the bias of its first attention, so that it back-propagates as far."""
    return steps(MODELS, repeats)


def tiny_step(repeats: int) -> Iterator[tuple[str, ...]]:
    """A training step so small that what counts is the number of operations; ten times the repeats."""
    return steps(TINY, 10 * repeats)


def steps(models: Mapping[str, Callable[[], Any]], repeats: int) -> Iterator[tuple[str, ...]]:
    for name, build in models.items():
        sides = {}
        for side in ("base", "lora", "hora", "control"):
            torch.manual_seed(0)
            model, targets, loss = build()
            if side == "base":
                frozen(model)
                first = next(module for key, module in model.named_modules() if key.endswith(targets[0]))
                first.bias = nn.Parameter(torch.zeros(first.out_features))
            else:
                model = (with_hora if side == "hora" else with_lora)(model, 8, targets)
            sides[side] = training_step(model, loss)
        yield (name, *times(medians(sides, repeats)))


def times(got: Mapping[str, float]) -> tuple[str, ...]:
    return (
        *(f"{got[name] * 1e3:.4g}" for name in ("base", "lora", "hora")),
        f"{got['hora'] / got['lora']:.2f}",
        f"{got['hora'] / got['base']:.2f}",
    )


@torch.no_grad()
def decode(repeats: int) -> Iterator[tuple[str, ...]]:
    """One token of SmolLM2-135M with 64 in the cache, and one query projection of it; ten times the repeats."""
    models = {}
    wraps = {"base": None, "lora": with_lora, "hora": with_hora, "plain": with_hora, "control": with_lora}
    for side, wrap in wraps.items():
        torch.manual_seed(0)
        model, targets, _ = smollm()
        models[side] = (frozen(model) if wrap is None else wrap(model, 8, targets)).eval()
    with ExitStack() as scopes:
        scopes.enter_context(cached_factors(models["hora"]))
        for what, stepper in {"one token": token, "one q_proj": query}.items():
            got = medians({name: stepper(model) for name, model in models.items()}, 10 * repeats)
            yield (f"{what}, in cached_factors", *times(got))
            yield (f"{what}, in a call", *times(got | {"hora": got["plain"]}))


def token(model: nn.Module) -> Step:
    """Decoding of one token, always the same."""
    cache, ids = transformers.DynamicCache(), torch.randint(0, 49152, (1, 64))
    model(input_ids=ids, past_key_values=cache, use_cache=True)

    def run() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return run


def query(model: nn.Module) -> Step:
    """One call of the first query projection for one token."""
    q_proj = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    x = torch.randn(1, 1, q_proj.in_features)
    return lambda: q_proj(x)


class QueryValue(nn.Module):
    """Query and value projections of one input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_heads = dim // 64
        self.q_proj, self.v_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_proj(x), self.v_proj(x)


def memory(repeats: int) -> Iterator[tuple[str, ...]]:
    """Bytes saved for backward by q and v, and the peak of live bytes in one step."""
    for dropout in (0.0, 0.1):
        got = {}
        for side in ("lora", "hora"):
            base = QueryValue(2048).to(torch.bfloat16)
            wrap = with_lora if side == "lora" else with_hora
            model = wrap(base, 8, ["q_proj", "v_proj"], **{f"{side}_dropout": dropout}).train()
            x = torch.randn(1, 4096, 2048, dtype=torch.bfloat16, requires_grad=True)
            weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
            got[side] = saved_activations(lambda model=model, x=x: model(x), weights)
        yield (f"saved by q and v, bf16, 4096 x 2048, dropout {dropout}", *bytes_of(got))
    for name, build in MODELS.items():
        got = {}
        for side in ("lora", "hora"):
            torch.manual_seed(0)
            model, targets, loss = build()
            run = training_step((with_lora if side == "lora" else with_hora)(model, 8, targets), loss)
            run()
            got[side] = peak_bytes(run)
        yield (f"peak of a step, {name}", *bytes_of(got))


def saved_activations(run: Step, weights: set[int]) -> int:
    """Bytes of distinct storages that autograd keeps, weights aside."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept.append(run())  # results live, so no storage is counted twice under one address
    return sum(seen.values())


def peak_bytes(run: Step) -> int:
    """Highest sum of bytes allocated and not yet freed during a step, from the profiler's allocation events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def bytes_of(got: Mapping[str, int]) -> tuple[str, ...]:
    return ("", f"{got['lora'] / 2**20:.1f}", f"{got['hora'] / 2**20:.1f}", f"{got['hora'] / got['lora']:.2f}", "")


def generation(repeats: int) -> list[tuple[str, ...]]:
    """All factors, forward and backward, beside a training step of 2048 tokens."""
    model, targets, loss = llama()
    model = with_hora(model, 8, targets)
    nets = [net for module in model.modules() if isinstance(module, HoraLayer) for net in module.hora_hyper.values()]

    def generate() -> None:
        outputs = [part for net in nets for p in net.layer for part in net(p) if part.grad_fn is not None]
        torch.autograd.backward(outputs, [torch.ones_like(part) for part in outputs])

    got = medians({"step": training_step(model, loss), "generate": generate}, repeats)
    share = got["generate"] / got["step"]
    return [
        (
            f"factors of {2 * len(nets)} projections, of a step",
            "",
            f"{got['step'] * 1e3:.1f}",
            f"{got['generate'] * 1e3:.1f}",
            f"{share:.4f}",
            "",
        )
    ]


def merge(repeats: int) -> list[tuple[str, ...]]:
    """Merging projections of 4096 x 4096 beside copying their bytes; 8 of them, the issue's 64 take 8 times as long."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        weights = [torch.randn(4096, 4096).to(dtype) for _ in range(8)]
        a, b = torch.randn(8, 4096), torch.randn(4096, 8)
        sides = {
            "copy": lambda: [weight.clone() for weight in weights],
            "merge": lambda: [merged_weight(weight, [(Layout(), a, b, 1.0)]) for weight in weights],
        }
        got = medians(sides, max(3, repeats // 3))
        rows.append(
            (
                f"merge 8 of 4096 x 4096, {dtype}, of copying",
                "",
                f"{got['copy'] * 1e3:.1f}",
                f"{got['merge'] * 1e3:.1f}",
                f"{got['merge'] / got['copy']:.2f}",
                "",
            )
        )
    return rows


def verified(repeats: int) -> Iterator[tuple[str, ...]]:
    """One `verify` beside one training step of SmolLM2-135M with HoRA, 1 x 32 tokens; the ratio says how many steps."""
    model = with_hora(transformers.LlamaForCausalLM(SMOLLM), 8, ("q_proj", "v_proj"))
    ids = torch.arange(32)[None]
    step = training_step(model, lambda model: model(input_ids=ids, labels=ids, use_cache=False).loss)
    got = medians({"step": step, "verify": lambda: verify(model, {"input_ids": ids}).require()}, max(3, repeats // 3))
    ratio = f"{got['verify'] / got['step']:.2f}"
    yield "verify, of a training step", "", f"{got['step'] * 1e3:.4g}", f"{got['verify'] * 1e3:.4g}", ratio, ""


SECTIONS = {
    "projection": projection,
    "step": step,
    "tiny-step": tiny_step,
    "decode": decode,
    "memory": memory,
    "generation": generation,
    "merge": merge,
    "verify": verified,
}
HEADER = ("", "base", "LoRA", "HoRA", "HoRA/LoRA", "HoRA/base", "branch/LoRA")


def main() -> None:
    """Print one table per section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    global clock
    clock = options.clock
    torch.set_num_threads(options.threads)
    results = {}
    for name in options.only:
        rounds.clear()
        unit = "MiB" if name == "memory" else "ms"
        print(f"\n{name} ({unit}): {SECTIONS[name].__doc__}")
        print("  ".join((HEADER[0].ljust(58), *(title.rjust(11) for title in HEADER[1:]))))
        for label, *cells in SECTIONS[name](options.repeats):
            print("  ".join((label.ljust(58), *(cell.rjust(11) for cell in cells))), flush=True)
            if "lora" in rounds:
                results[f"{name}: {label}"] = against_lora(rounds)
    if options.json:
        options.json.write_text(json.dumps(machine() | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
