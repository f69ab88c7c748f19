"""The results of servers, and of many adapters in PyTorch, as tables of the guide."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results.json", HERE.parents[1] / "docs/guide/serving.md"
MANY = HERE.parents[1] / "packages/hora-torch/benchmarks/many_adapters.json"
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
    "MLX": (("graphs", "mlx"), ("llama", "qwen3", "phi3")),
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
    return "\n".join(lines) + "\n"


def many_table(results: Mapping[str, Any]) -> str:
    """Markdown: time and memory by number of adapters and method."""
    lines = ["| layers | adapters | method | one, ms | mixed, ms | MB an adapter |", "|---|---|---|---|---|---|"]
    for row in results["rows"]:
        times = f"{row['one_time_ms']:.0f} | {row['mixed_time_ms']:.0f}"
        lines.append(
            f"| {row['layers']} | {row['adapters']} | {row['method']} | {times} | {row['adapter_bytes'] / 1e6:.2f} |"
        )
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    note = f"Rank {results['rank']}, medians of {results['repeats']}; {versions}."
    return "\n".join([*lines, "", note]) + "\n"


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
