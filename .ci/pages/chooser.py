"""Should I use it? A table for the README from result files, and the verdicts on the paper's claims in few words."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = "packages/hora-bench/results"
START, END = "<!-- from result files, by python .ci/site.py readme -->", "<!-- end of what is from result files -->"
SCREENED = ("default", "residual", "joint")
WORDS = ("confirmed", "not resolved", "not seen", "not measured")


def readme(root: Path) -> str:
    """The README with its tables made anew."""
    text = (root / "README.md").read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{box(root)}\n{END}{after}"


def box(root: Path) -> str:
    """Both tables."""
    lines = ["| HoRA beside LoRA, rank for rank | measured |", "|---|---|"]
    lines += [f"| {what} | {said} |" for what, said in _measured(root)]
    lines += ["", "| claim, of the paper unless it says ours | here |", "|---|---|"]
    lines += [f"| {claim} | {said} |" for claim, said in _verdicts(root)]
    return "\n".join([*lines, ""])


def _claims(root: Path) -> list[tuple[str, str, str]]:
    """Claim, verdict and reason, as the page says that ``hora-bench report`` writes from the result files."""
    table = (root / "docs/benchmarks.md").read_text().split("## The paper's claims")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split(" | ")] for line in table.splitlines() if line.startswith("| ")]
    return [(cells[0].strip("| "), cells[1], cells[2]) for cells in rows[1:]]


def _measured(root: Path) -> Iterator[tuple[str, str]]:
    compared = [why for claim, _, why in _claims(root) if claim == "more accurate than LoRA"]
    most = max(compared, key=lambda why: int(re.search(r"over (\d+) paired seeds", why)[1]))
    yield "accuracy, the comparison with most seeds", most.split("; ")[0].split(". Of ")[0]
    if screens := "; ".join(_screens(root)):
        yield "accuracy on screens, proxies at equal parameters", screens
    yield "trained parameters, times LoRA's", "; ".join(_parameters(root))
    speeds = [_read(root, path.stem) for path in sorted((root / RESULTS).glob("speed-*.json"))]
    steps = [step for speed in speeds for step in speed["steps"] if step["method"] == "hora" and "over_lora" in step]
    yield "a training step, times LoRA's", _range([step["over_lora"]["ratio"] for step in steps])
    yield "memory of a step, times LoRA's", _range([step["peak_over_lora"] for step in steps])
    tiny = json.loads((root / "packages/hora-torch/benchmarks/results/compare-cpu.json").read_text())["results"]
    small = [found["hora"]["cpu"]["ratio"] for name, found in tiny.items() if name.startswith("tiny-step")]
    yield "a step of a tiny model, milliseconds on a CPU", f"{_range(small)}: here it is felt"
    calls = [one for speed in speeds for one in speed["inference"] if one["method"] == "hora"]
    merged = [one["over_frozen"]["ratio"] for one in calls if one["form"] == "merged" and "over_frozen" in one]
    yield "inference once merged, times the base model's", _range(merged)


def _screens(root: Path) -> Iterator[str]:
    """HoRA's forms beside LoRA at its number of parameters, a screen a task."""
    words: dict[str, list[str]] = {}
    for path in sorted((root / RESULTS).glob("screen-*.json")):
        for row in _read(root, path.stem).get("rows", ()):
            if row.get("value") in SCREENED and "word" in row and row["fraction"] < 1:  # 100 images
                words.setdefault(row["value"], []).append(row["word"])
    for form, found in words.items():
        counts = {word: found.count(word) for word in ("better", "worse") if word in found}
        said = " and ".join(f"{word} in {count}" for word, count in counts.items())
        yield f"{form} {said or 'neither better nor worse on any'} of {len(found)} screens"


def _parameters(root: Path) -> Iterator[str]:
    """By rank, for each model that was counted, from the smallest; both of a ratio are of one file."""
    counts: dict[tuple[str, int], tuple[int, int]] = {}
    counted = {(one["model"], one["method"]): one for one in _read(root, "cost")["params"]}
    for (model, method), ours in counted.items():
        if method == "hora":
            counts[model, ours["spec"]["rank"]] = ours["params_count"], counted[model, "lora"]["params_count"]
    for path in sorted((root / RESULTS).glob("speed-*.json")):
        setting, steps = (_read(root, path.stem)[key] for key in ("setting", "steps"))
        own = {one["method"]: one["params_count"] for one in steps}
        if {"hora", "lora"} <= own.keys():
            counts[setting["model"], setting["options"]["rank"]] = own["hora"], own["lora"]
    ranks: dict[int, list[tuple[int, str]]] = {}
    for (model, rank), (ours, lora) in counts.items():
        ranks.setdefault(rank, []).append((ours, f"{ours / lora:.2f} ({model})"))
    for rank, ratios in sorted(ranks.items()):
        yield f"at rank {rank}: {', '.join(ratio for _, ratio in sorted(ratios))}"


def _verdicts(root: Path) -> Iterator[tuple[str, str]]:
    claims = _claims(root)
    for claim in dict.fromkeys(claim for claim, _, _ in claims):
        words = [word for each, word, _ in claims if each == claim]
        counted = {word: words.count(word) for word in WORDS if word in words}
        yield claim, ", ".join(f"{word} in {n}" for word, n in counted.items()) if len(words) > 1 else words[0]


def _range(ratios: list[float]) -> str:
    low, high = min(ratios), max(ratios)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def _read(root: Path, name: str) -> Any:
    return json.loads((root / RESULTS / f"{name}.json").read_text())["result"]
