"""Numbers in the README are those of committed result files."""

import json
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def rows_of_each_row() -> list[str]:
    results = json.loads((PACKAGE / "benchmarks/results/each-row-cpu.json").read_text())["results"]
    by = {(r["rows"], r["seq"], r["variant"]): r for r in results}
    lines = []
    for rows, seq in dict.fromkeys((r["rows"], r["seq"]) for r in results):
        base, one, each, merged = (by[rows, seq, variant] for variant in ("base", "one", "each", "merged"))
        times = (f"{r['call_s'] / base['call_s']:.2f}" for r in (one, each, merged))
        sizes = (f"{r['adapters_bytes'] / 2**20:.1f}" for r in (each, merged))
        lines.append(f"| {rows} x {seq} | {' | '.join([*times, *sizes])} |")
    return lines


VARIANTS = {"hora": "`HoraModel`", "adapt": "`adapt`", "equal": "as many parameters", "control": "LoRA again"}
WORKLOADS = {"llama": "LLaMA, 8 layers, q and v", "vit": "ViT, 12 layers, fused qkv"}


def rows_against_qwix() -> list[str]:
    results = json.loads((PACKAGE / "benchmarks/results/against-qwix-cpu.json").read_text())["results"]
    lines = []
    for workload, words in ((name, words) for name, words in WORKLOADS.items() if name in results):
        for variant, what in VARIANTS.items():
            found = results[workload][variant]
            low, high = found["step_cpu"]["ratio_95"]
            ratios = [found[f"{key}_ratio"] for key in ("flops", "peak_memory_bytes", "start")]
            cells = [f"{found['step_cpu']['ratio']:.2f} ({low:.2f} to {high:.2f})", *(f"{r:.3f}" for r in ratios[:2])]
            lines.append(f"| {words}: {what} | {' | '.join(cells)} | {ratios[2]:.2f} |")
    return lines


def test_the_readme_says_what_a_step_costs_beside_qwix():
    text = (PACKAGE / "README.md").read_text()
    assert [line for line in rows_against_qwix() if line not in text] == []


def test_the_readme_says_what_compiling_takes():
    results = json.loads((PACKAGE / "benchmarks/results/against-qwix-cpu.json").read_text())["results"]
    sides = [(results[name][side], results[name]["qwix"]) for name in WORKLOADS for side in ("hora", "adapt", "equal")]
    ratios = [ours["compile_s"] / qwix["compile_s"] for ours, qwix in sides]
    text = " ".join((PACKAGE / "README.md").read_text().split())
    assert f"compiling alone takes {min(ratios):.1f} to {max(ratios):.1f} times as long as LoRA's" in text


def test_the_readme_says_what_an_adapter_for_each_row_costs():
    lines = rows_of_each_row()
    assert len(lines) == 3
    text = (PACKAGE / "README.md").read_text()
    assert [line for line in lines if line not in text] == []
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert {f"takes {float(merged) / float(each):.0f} times the memory" for *_, each, merged in cells} == {
        "takes 22 times the memory"
    }
    assert "takes 22 times the memory of the adapters" in text
