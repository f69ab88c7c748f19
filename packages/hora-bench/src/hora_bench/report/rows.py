"""Rows of comparisons in one form, whichever version of the tool wrote them; no stored value changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from hora_bench.stats import LEVEL, MARGIN, Difference

COMPARISONS: Final = ("sweep", "ablate", "sample-efficiency")
Row = dict[str, Any]


def rows_of(result: dict[str, Any]) -> list[Row]:
    """Rows with ``factor``, ``value``, ``fraction``, differences from LoRA with what could have been seen, the word for
    them, and whether the best rate is at the grid's edge.

    Earlier versions took z for few seeds, so their intervals of means over seeds are left out; their accuracies are
    there, and differences are formed anew from them.
    """
    setting = result["setting"]
    stored = result["rows"] if "rows" in result else [_of_curve(point) for point in result["curve"]]
    several = "test_loss" not in stored[0] and len(setting["seeds"]) > 1 if stored else False
    rows = []
    for one in stored:
        row: Row = {"task": setting["task"], "fraction": setting["fraction"], "rate_at_edge": _edge(one, result), **one}
        row["seeds"] = len(row.get("accuracies_pct", setting["seeds"]))
        if several:
            row = {key: value for key, value in row.items() if key not in ("low_pct", "high_pct")}
        rows.append(row)
    for row in rows:
        row["over_lora"] = _over_lora(row, rows)
    for row in rows:
        row["word"] = _word(row, rows, result)
    return rows


def proxy_of(result: dict[str, Any]) -> bool:
    """Whether a result is of a screen, by which no claim is judged."""
    return result["setting"].get("last_blocks") is not None


def of_wrong_labels(result: dict[str, Any]) -> bool:
    """Whether labels that are learned from are wrong in every row, as the names of the tasks say."""
    tasks = [row["task"] for row in rows_of(result)]
    return bool(tasks) and all("-wrong" in task for task in tasks)


def _word(row: Row, rows: Sequence[Row], result: dict[str, Any]) -> str:
    """What a tuned comparison with LoRA allows to say: nothing where a rate of either is at the edge of its grid."""
    over = row["over_lora"]
    if not result.get("search") or over is None or is_lora(row):
        return ""
    alike = ("task", "fraction", "steps")
    loras = (other for other in rows if is_lora(other) and all(other.get(key) == row.get(key) for key in alike))
    if row["rate_at_edge"] or any(lora["rate_at_edge"] for lora in loras):
        return "not resolved"
    return over.word(result["setting"].get("margin_pct", MARGIN))


def name_of(row: Row) -> str:
    """What a row is called."""
    return row["factor"] if row["value"] is None else str(row["value"]) if row["factor"] == "method" else _changed(row)


def is_lora(row: Row) -> bool:
    """Whether a row is what others are compared with: it differs from itself by nothing."""
    over = row["over_lora"]
    return over is not None and (over.mean, over.low, over.high) == (0, 0, 0)


def _changed(row: Row) -> str:
    return str(row["value"]) if row["factor"] == "variant" else f"{row['factor']} {row['value']}"


def _of_curve(point: Row) -> Row:
    return {"factor": "method", "value": point["method"], **{k: v for k, v in point.items() if k != "method"}}


def paired(row: Row, other: Row) -> Difference:
    """Of two choices over the seeds that both have: a race stops them at different ones, at the level of all looks."""
    seeds = min(len(row["accuracies_pct"]), len(other["accuracies_pct"]))
    level = row.get("over_lora_pct", {}).get("level", LEVEL)
    return Difference.of(row["accuracies_pct"][:seeds], other["accuracies_pct"][:seeds], level=level)


def typical(row: Row, other: Row) -> str:
    """Median of the paired differences, which a few seeds that collapse do not move, and how many seeds are ahead."""
    differences = np.subtract(*zip(*zip(row["accuracies_pct"], other["accuracies_pct"], strict=False), strict=True))
    return f"{float(np.median(differences)):+.2f}, ahead in {int((differences > 0).sum())} of {len(differences)} seeds"


def _over_lora(row: Row, rows: Sequence[Row]) -> Difference | None:
    """As it was stored, or from LoRA on the same fraction, where curves stored none."""
    if stored := row.get("over_lora_pct"):
        seeds, level = stored.get("seeds_count", row["seeds"]), stored.get("level", LEVEL)
        return Difference.stored(stored["mean_pct"], stored["low_pct"], stored["high_pct"], seeds, level)
    for other in rows:
        same = (other["factor"], other["value"], other["fraction"]) == ("method", "lora", row["fraction"])
        if same and "over_lora_pct" not in other and "accuracies_pct" in row:
            return paired(row, other)
    return None


def _edge(row: Row, result: dict[str, Any]) -> str | None:
    """On which side of the grid the best rate lies; None inside."""
    keys = ("factor", "value", "fraction") if "factor" in row else ("method", "fraction")
    rates = sorted({trial["learning_rate"] for trial in result.get("search", []) if _same(trial, row, keys)})
    if len(rates) < 2 or row.get("learning_rate") not in (rates[0], rates[-1]):
        return None
    return "lowest" if row["learning_rate"] == rates[0] else "highest"


def _same(trial: Row, row: Row, keys: Sequence[str]) -> bool:
    trial = trial if "factor" in trial else {"factor": "method", "value": trial["method"], **trial}
    return all(trial.get(key) == row.get(key) for key in keys)
