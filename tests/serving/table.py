"""The results of servers, and of many adapters in PyTorch, as tables of the guide."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results.json", HERE.parents[1] / "docs/guide/serving.md"
MANY = HERE.parents[1] / "packages/hora-torch/benchmarks/results/many_adapters.json"
BEGIN, END = "<!-- results of nox -s serving -->\n", "<!-- end of results -->"
MANY_BEGIN, MANY_END = "<!-- results of many_adapters.py -->\n", "<!-- end of many_adapters.py -->"

BOUND = 1e-3
"""How far log-probabilities may be from those of transformers."""

_CAUSAL = ("llama", "qwen2", "qwen3", "phi3")
ENGINES: Mapping[str, tuple[tuple[str, ...] | None, tuple[str, ...]]] = {
    "llama.cpp": (None, (*_CAUSAL, "gpt2")),
    "node-llama-cpp": (("node",), (*_CAUSAL, "gpt2")),
    "vLLM": (("vllm",), _CAUSAL),
    "ONNX Runtime": (("graphs", "onnxruntime"), ("llama", "phi3")),
    "OpenVINO": (("graphs", "openvino"), ("llama", "phi3")),
    "MLX": (("graphs", "mlx"), _CAUSAL),
}
"""Engine to who runs it, with which arguments, and architectures."""

FORMS = {
    "llama.cpp": "`hora export-gguf`, chosen by request",
    "node-llama-cpp": "`hora export-gguf`",
    "vLLM": "`hora export-lora`, chosen by request",
    "ONNX Runtime": "`hora merge`",
    "OpenVINO": "`hora merge`",
    "MLX": "`hora merge`",
}


SERVERS: Mapping[str, tuple[str, ...]] = {"vLLM": ("py", "console"), "llama.cpp": ("console",), "MLX": ("console",)}
"""Headings of the guide to the languages of the commands below them that commands.py runs."""


def table(results: Mapping[str, Any]) -> str:
    """Markdown: per engine and architecture the distance of the base, and the worst of its adapters."""
    names = list(ENGINES["llama.cpp"][1])
    lines = [
        f"| engine | loads | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for engine in ENGINES:
        cells = [_cell(results["distances"].get(engine, {}).get(name)) for name in names]
        shown = f"{engine} {results['versions'].get(engine, '')}".strip()
        lines.append(f"| {shown} | {FORMS[engine]} | {' | '.join(cells)} |")
    ran = [
        f"{heading} {entry['version']} ({'Python' if kind == 'py' else '`' + entry['lines'][0].split()[0] + '`'})"
        for heading, by_kind in sorted(results["commands"].items())
        for kind, entry in sorted(by_kind.items())
        if entry["right"]
    ]
    note = f"The commands below were run as they are written, and wrote what the adapted model does: {', '.join(ran)}."
    return "\n".join([*lines, "", note]) + "\n"


METHODS = {
    "lora": "LoRA",
    "control": "LoRA again",
    "hora": "HoRA",
    "cached": "HoRA, `cached_factors`",
    "frozen": "HoRA, `freeze`",
}


def many_table(results: Mapping[str, Any]) -> str:
    """Markdown: time, its ratio to LoRA's with an interval, and memory by number of adapters and method."""
    lines = [
        "| adapters | method | one, ms | of LoRA | mixed, ms | of LoRA | MB an adapter |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        for side, name in METHODS.items():
            cells = [cell for kind in ("one", "mixed") for cell in _times(row[kind][side]["cpu"])]
            size = f"{row['adapter_bytes'][side] / 1e6:.2f}"
            lines.append("| " + " | ".join([str(row["adapters_count"]), name, *cells, size]) + " |")
    versions = ", ".join(f"{name} {results[name]}" for name in ("torch", "peft", "transformers"))
    layers = results["rows"][0]["layers_count"]
    turns = " or ".join(map(str, sorted({row["repeats_count"] for row in results["rows"]})))
    note = (
        f"{layers} layers, rank {results['rank']}; medians of {turns} turns in processor time of "
        f"one thread ({results['cpu']}, load {results['load_average']:.0f}), 95 % intervals of a bootstrap over turns; "
        f"{versions}."
    )
    return "\n".join([*lines, "", note]) + "\n"


def _times(found: Mapping[str, Any]) -> tuple[str, str]:
    low, high = found["ratio_95"]
    return f"{1e3 * found['median_s']:.0f}", f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"


def filled(page: str) -> str:
    """The page with the tables of the stored results."""
    page = _between(page, BEGIN, END, table(json.loads(RESULTS.read_text())))
    return _between(page, MANY_BEGIN, MANY_END, many_table(json.loads(MANY.read_text())))


def _between(page: str, begin: str, end: str, content: str) -> str:
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"


def _cell(row: Mapping[str, float | None] | None) -> str:
    if row is None:
        return "–"
    if any(value is None for value in row.values()):
        return "failed"
    return f"{row['base']:.0e} / {max(value for case, value in row.items() if case != 'base'):.0e}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
