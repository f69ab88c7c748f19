"""Robustness in tables and verdicts: what is registered, every condition of every choice, and wrong labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from hora_bench.report.comparisons import shown
from hora_bench.report.judging import UNRESOLVED, Said, edge_said, of_difference, others, points, unless
from hora_bench.report.rows import is_lora, name_of, of_wrong_labels, proxy_of, rows_of
from hora_bench.report.writing import cell
from hora_bench.stats import MARGIN, Difference

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


def robust(result: Result) -> Said:
    """By the registered shares kept, of the default or of what stands first after LoRA; of a screen, and called so."""
    margin = result["setting"]["margin_pct"]
    for task, answer in dict.fromkeys((one["task"], one["answer"]) for one in result["answers"]):
        rows = [one for one in result["answers"] if (one["task"], one["answer"]) == (task, answer)]
        judged = [one for one in rows if "word" in one]
        lora = next(one for one in rows if "word" not in one)
        if not judged:
            continue
        first = next((one for one in judged if name_of(one) == "default"), judged[0])
        over = difference_of(first, "kept_over_lora_pct")
        compared = (name_of(first), name_of(lora))
        edge = edge_said(*(one for one in result["choices"] if one["task"] == task and name_of(one) in compared))
        yield (
            UNRESOLVED if over is None or edge else of_difference(over),
            (
                f"a screen, a proxy: under {answer} {name_of(first)} keeps {first['kept_pct']} % of what it is above "
                f"chance on clean {task} ({first['clean_pct']} %), LoRA {lora['kept_pct']} % ({lora['clean_pct']} %): "
                f"{'nothing to compare' if over is None else points(over)}{edge}{others(judged, first)} "
                f"(equal: within {margin:g})"
            ),
        )


def wrong_labels(result: Result) -> Said:
    """By paired differences where labels of training and validation are wrong; of screens too, and called so."""
    if not of_wrong_labels(result):
        return
    rows, margin = rows_of(result), result["setting"].get("margin_pct", MARGIN)
    for task in dict.fromkeys(row["task"] for row in rows):
        judged = [row for row in rows if row["task"] == task and row["word"]]
        lora = next((row for row in rows if row["task"] == task and is_lora(row)), None)
        if lora is None or not judged:
            continue
        first = next((row for row in judged if name_of(row) == "default"), judged[0])
        edge, proxy = edge_said(first, lora), "a screen, a proxy: " if proxy_of(result) else ""
        yield (
            unless(edge, of_difference(first["over_lora"])),
            (
                f"{proxy}{name_of(first)} on {100 * first['fraction']:g} % of {task}: {points(first['over_lora'])}"
                f"{edge}{others(judged, first)} (equal: within {margin:g})"
            ),
        )
