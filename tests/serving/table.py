"""The results of servers as a table of the guide."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results.json", HERE.parents[1] / "docs/guide/serving.md"
BEGIN, END = "<!-- results of nox -s serving -->\n", "<!-- end of results -->"

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


def filled(page: str, results: Mapping[str, Any]) -> str:
    """The page with the table of the results."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{rest.partition(END)[2]}"


def _cell(row: Mapping[str, float | None] | None) -> str:
    if row is None:
        return "–"
    if any(value is None for value in row.values()):
        return "failed"
    return f"{row['base']:.0e} / {max(value for case, value in row.items() if case != 'base'):.0e}"
