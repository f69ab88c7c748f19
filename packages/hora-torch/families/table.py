"""results.json as a page of the documentation."""

from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]

CHECKS = {
    "start": "a new adapter leaves the outputs as they are",
    "gradients": "every layer used trains, nothing else does",
    "effect": "the adapter changes the outputs, disabled it does not",
    "merged": "merged equals adapted, and only rows of the projections change",
    "unmerged": "unmerging restores every bit",
    "loaded": "saved and loaded, the outputs are equal",
    "exported": "exported as LoRA and loaded by plain PEFT, the outputs are equal",
    "verified": "`hora_torch.verify` finds nothing wrong",
}
"""Columns after rows and heads, and what each says."""

SECTIONS = {
    "transformers": lambda name: ": " not in name,
    "timm": lambda name: name.startswith("timm: "),
    "torch.nn, diffusers and one's own": lambda name: ": " in name and not name.startswith("timm: "),
}

KEYS = ("told", "default", "named")
"""The ways in which a family is tried, the first that works is shown."""

_ASKED = (*KEYS, *(f"{key}_rows" for key in KEYS), *CHECKS)

RED = '<span style="color: #c00">**{}**</span>'


def page(results: Mapping[str, Any]) -> str:
    """The whole page, from the versions of the libraries and the rows by family."""
    versions, results = results["versions"], results["families"]
    built = {name: row for name, row in results.items() if _answer(row, "built") == "ok"}
    seen = {name: row for name, row in built.items() if _is_attention(row)}
    lines = [_HEAD.format(versions=", ".join(f"{name} {version}" for name, version in versions.items()))]
    lines += [_legend(), "## Summary\n", *_summary(built, seen), ""]
    for title, belongs in SECTIONS.items():
        rows = [_line(name, row) for name, row in seen.items() if belongs(name)]
        lines += [f"## {title}\n", *_header(), *rows, ""]
    others = [name for name in built if name not in seen]
    lines += ["## Without attention that LoRA or HoRA would adapt\n", ", ".join(others) + "\n"]
    lines += ["## Not built\n", "These need inputs, sizes or libraries that the table does not provide:", ""]
    lines += [", ".join(name for name in results if name not in built) + "\n"]
    return "\n".join(lines)


_HEAD = """# Model families

<!-- written by nox -s families: do not edit -->

What HoRA does on {versions}, tried on a tiny random model of each family. `nox -s families` builds the models, runs
every check and writes this page.
"""


def _legend() -> str:
    lines = [
        "`q 4x8` is four heads of width eight; the default of `HoraConfig` finds them but where the row shows the line",
        "that does. **Rows** says whether each adapted row belongs to the projection and",
        "the head that it is said to belong to: found from gradients alone, by which rows reach which columns of the",
        "attention's output. ✓ holds, · cannot be seen on this model, and",
        RED.format("WRONG") + " is what must never be. A refusal is an error that says what to do; ⚠ is an alarm of",
        "`hora_torch.verify` where the other checks find nothing wrong.\n",
        *(f"- **{name}**: {meaning}" for name, meaning in CHECKS.items()),
        "",
    ]
    return "\n".join(lines)


def _summary(built: Mapping[str, Row], seen: Mapping[str, Row]) -> Iterable[str]:
    default = [name for name, row in seen.items() if _key(row) == "default"]
    told = [name for name, row in seen.items() if _key(row) in ("told", "named")]
    refused = {name: _lora(row) for name, row in seen.items() if _key(row) is None}
    wrong = {name: found for name, row in seen.items() if (found := faults(row))}
    yield "| | families |"
    yield "|---|---|"
    yield f"| built | {len(built)} |"
    yield f"| with attention or targets of LoRA | {len(seen)} |"
    yield f"| adapted by default | {len(default)} |"
    yield f"| adapted with the line that the row shows | {len(told)} |"
    yield f"| refused with the reason, as PEFT's LoRA is | {sum(lora == 'no' for lora in refused.values())} |"
    yield f"| refused with the reason, where LoRA works | {sum(lora != 'no' for lora in refused.values())} |"
    yield f"| {RED.format('WRONG') if wrong else 'wrong'} | {len(wrong)} |"
    yield ""
    yield from (f"- {RED.format(name)}: {'; '.join(found)}" for name, found in wrong.items())


def _header() -> list[str]:
    columns = ("family", "LoRA", "HoRA adapts", "rows", *CHECKS, "remarks")
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]


def _line(name: str, row: Row) -> str:
    key = next((key for key in KEYS if f"{key}_adapts" in row), None)
    if key is None:
        cells = ["refused"] + [""] * (1 + len(CHECKS))
    else:
        adapts = row[f"{key}_adapts"] + (f" with `{row['line']}`" if "line" in row else "")
        cells = [adapts, _mark(_answer(row, f"{key}_rows")), *(_mark(_answer(row, check)) for check in CHECKS)]
    return f"| {name} | {_lora(row)} | {' | '.join(cells)} | {_remarks(row)} |"


def _key(row: Row) -> str | None:
    """Which of the ways works: what is injected may refuse to run."""
    if _answer(row, "start").startswith("refused"):
        return None
    return next((key for key in KEYS if f"{key}_adapts" in row and _answer(row, key) == "ok"), None)


def _lora(row: Row) -> str:
    if _answer(row, "lora") == "ok":
        return "default"
    return "named" if _answer(row, "lora_named") == "ok" else "no"


def _mark(answer: str) -> str:
    kind = answer.partition(":")[0]
    return {"ok": "✓", "unseen": "·", "alarm": "⚠", "refused": "refused", "WRONG": RED.format("WRONG")}.get(
        kind, RED.format("error")
    )


def _remarks(row: Row) -> str:
    found = [_answer(row, key) for key in _ASKED if key in row and row[key] != "none"]
    texts = [text.removeprefix("unseen: ").removeprefix("refused: ") for text in found if text != "ok"]
    if "left_out" in row:
        texts.append(f"left out: {row['left_out']['modules']}, {row['left_out']['why']}")
    return "; ".join(dict.fromkeys(_short(text) for text in texts)).replace("|", "\\|")


def _short(text: str) -> str:
    text = text.removeprefix("Please specify `target_modules`: ")
    return text if len(text) <= 160 else text[:157] + "..."


def faults(row: Row) -> list[str]:
    """What must not be."""
    found = [(key, _answer(row, key)) for key in _ASKED if key in row]
    return [f"{key}, {_short(text)}" for key, text in found if text.startswith(("WRONG", "error"))]


def _is_attention(row: Row) -> bool:
    return (
        "told_adapts" in row
        or "default_adapts" in row
        or _answer(row, "named") != "none"
        or _answer(row, "lora") == "ok"
    )


def _answer(row: Row, key: str) -> str:
    """Answers that are ``"ok"`` are left out of the file."""
    return row.get(key, "ok")
