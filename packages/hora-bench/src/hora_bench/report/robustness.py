"""Robustness in tables: what is registered, and every condition of every choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from hora_bench.report.comparisons import shown
from hora_bench.report.rows import name_of
from hora_bench.report.writing import cell
from hora_bench.stats import Difference

Result = dict[str, Any]
OVER: Final = ("over_lora_pct", "lost_over_lora_pct", "kept_over_lora_pct")


def lines_of(result: Result) -> Iterator[tuple[str, Sequence[str], list[tuple[str, ...]]]]:
    """Title, header and cells of what is registered, and then of every condition."""
    rates = {choice_of(one): one for one in result["choices"]}
    rows: list[tuple[str, ...]] = [
        (
            *choice_of(one),
            str(one["answer"]),
            f"{one['clean_pct']}",
            f"{one['changed_pct']}",
            cell(one["kept_pct"]),
            shown(over := difference_of(one, OVER[-1])),
            "{:+} to {:+}".format(*one["of_other_examples_pct"]) if "of_other_examples_pct" in one else "",
            cell(over and over.detectable),
            str(one.get("word", "")),
            _rate(rates[choice_of(one)]),
        )
        for one in result["answers"]
    ]
    header = ("task", "choice", "mean of", "clean, %", "changed, %", "kept above chance, %", "kept over LoRA, %")
    header += ("of other examples", "could have seen", "verdict", "rate")
    yield "what is kept of accuracy above chance", header, rows
    rows = [
        (
            *choice_of(one),
            str(one["condition"]),
            f"{one['mean_pct']} ({one['low_pct']} to {one['high_pct']})",
            *(shown(difference_of(one, name)) for name in OVER),
            cell(one.get("kept_pct")),
            cell(one["test_loss"]),
        )
        for one in result["rows"]
    ]
    header = ("task", "choice", "condition", "accuracy, %", "over LoRA, points", "lost over LoRA, points")
    header += ("kept over LoRA, %", "kept, %", "test loss")
    yield "every condition, described and not judged", header, rows


def _rate(one: dict[str, Any]) -> str:
    return f"{one['learning_rate']:g}" + (f" ({one['rate_at_edge']} tried)" if one["rate_at_edge"] else "")


def choice_of(one: dict[str, Any]) -> tuple[str, str]:
    """Task and name of a choice in a record of robustness."""
    return f"{100 * one['fraction']:g} % of {one['task']}", name_of(one)


def difference_of(one: dict[str, Any], name: str) -> Difference | None:
    """A stored difference, where there is one."""
    found = one.get(name)
    bounds = ("mean_pct", "low_pct", "high_pct", "seeds_count", "level")
    return Difference.stored(*(found[bound] for bound in bounds)) if found else None
