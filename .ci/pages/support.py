"""What works with what, from result files: families, quantised bases and servers in one place."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

FAMILIES = {
    "language": "llama mistral mixtral qwen2 qwen3 qwen3_moe gemma2 gemma3_text phi3 gpt2 gpt_neox falcon deepseek_v3",
    "text encoders": "bert roberta deberta-v2 modernbert t5 bart",
    "images and speech": "vit dinov2 siglip clip swin beit whisper wav2vec2",
}
COLUMNS = {
    "rows": ("default_rows",),
    "trains": ("start", "gradients", "effect"),
    "merges": ("merged", "unmerged"),
    "saves": ("loaded",),
    "exports to LoRA": ("exported",),
}
SCALE = {"compile": "torch.compile", "fsdp2": "FSDP2"}
LEAD = """# What works

Read from result files when this site is built. Each part links to the page that says more.
✓ was tried and holds, · cannot be seen on the model that was tried, – was not tried.

- *torch.compile*: forward and backward are traced and compared; no kernels are generated. *FSDP2*: each block is shared
  out over two processes. Offload, tensor parallelism and the rest: [Large models](../guide/scale.md).
- What a method of PEFT may do, beside LoRA: [Beside LoRA](../guide/capabilities.md).
"""


def page(root: Path) -> str:
    """The page of all tables."""
    torch = root / "packages/hora-torch"
    families = _read(torch / "families/results.json")
    quantised = _read(torch / "quantised/results.json")
    serving = _read(root / "tests/serving/results.json")
    scale = _read(torch / "families/scale.json")["families"]
    lines = [LEAD, *_families(families, scale), *_quantised(quantised), *_servers(serving)]
    return "\n".join(lines)


def _families(results: Mapping[str, Any], scale: Mapping[str, Any]) -> Iterator[str]:
    yield "## Families, on PyTorch\n"
    yield f"A tiny random model of each, on {_versions(results)}. [All families](../guide/families.md).\n"
    for title, names in FAMILIES.items():
        rows = [
            (f"`{name}`", *_family(results["families"][name]), *_scale(scale.get(name, {}))) for name in names.split()
        ]
        yield from _table((title, "adapted by default", *COLUMNS, *SCALE.values()), rows)


def _family(row: Mapping[str, Any]) -> list[str]:
    if "default_adapts" not in row:
        return ["no", *("" for _ in COLUMNS)]
    return [row["default_adapts"], *(_mark([row.get(check, "ok") for check in checks]) for checks in COLUMNS.values())]


def _scale(answers: Mapping[str, str]) -> list[str]:
    """One mark for each way; what LoRA does not do either says so."""
    return [
        _mark([answer]) + " (LoRA too)" * answer.endswith("(LoRA too)") if (answer := answers.get(way)) else "–"
        for way in SCALE
    ]


def _mark(answers: Iterable[str]) -> str:
    """One mark for several answers: the worst. Answers that are ``"ok"`` are left out of the file."""
    kinds = {answer.partition(":")[0] for answer in answers}
    for kind, mark in (("WRONG", "wrong"), ("error", "error"), ("refused", "refused"), ("unseen", "·")):
        if kind in kinds:
            return mark
    return "✓" if kinds == {"ok"} else ", ".join(sorted(kinds))


def _quantised(results: Mapping[str, Any]) -> Iterator[str]:
    yield "## Quantised bases, on PyTorch\n"
    share = f"{results['update']:.0%}"
    yield (
        f"On {_versions(results)}, a CPU. *Loses* is what rounding the merged weight to codes loses of an update whose "
        f"norm is {share} of the weight's. [More](../guide/quantised.md).\n"
    )
    rows = []
    for base, both in results["bases"].items():
        found = both["hora"]
        merge = found["merge"]
        rows.append(
            (
                base,
                "✓" if isinstance(found["train"], float) else str(found["train"]),
                f"loses {merge:.0%}" if isinstance(merge, float) else str(merge),
                "✓" if found.get("save") is True else str(found.get("save", "–")),
                "✓" if isinstance(found.get("export"), float) else str(found.get("export", "–")),
            )
        )
    yield from _table(("base", "trains", "merges", "saves", "exports to LoRA"), rows)


def _servers(results: Mapping[str, Any]) -> Iterator[str]:
    yield "## Servers\n"
    yield "Largest difference of log-probabilities from `transformers`, on the base and with each adapter tried."
    yield "[More](../guide/serving.md).\n"
    distances = results["distances"]
    models = sorted({model for found in distances.values() for model in found})
    rows = [(engine, *(_largest(found.get(model)) for model in models)) for engine, found in distances.items()]
    yield from _table(("engine", *models), rows)


def _largest(found: Mapping[str, float] | None) -> str:
    return "–" if found is None else f"{max(found.values()):.0e}"


def _versions(results: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in results["versions"].items())


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    header = list(header)
    return [
        f"| {' | '.join(header)} |",
        "|" + "---|" * len(header),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def _read(path: Path) -> Any:
    return json.loads(path.read_text())
