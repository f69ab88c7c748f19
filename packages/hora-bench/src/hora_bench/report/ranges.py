"""Ranges of good rates as tables: their ends, widths beside LoRA's, and what the curvature at the start explains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hora_bench.report.judging import ABSENT, CONFIRMED, UNRESOLVED, Said
from hora_bench.report.rows import Row, name_of
from hora_bench.report.writing import cell

Result = dict[str, Any]
Lines = tuple[str, Sequence[str], Sequence[Sequence[str]], int]


def lines_of(result: Result) -> Iterator[Lines]:
    """Title, header, cells and number of columns that name a row, of each table."""
    margin, fall = (result["setting"][name] for name in ("margin", "fall"))
    header = ("choice", "task", "best, %", "from", "to", "times", "over LoRA's", "could have seen", "verdict")
    rows = [_range(row) for row in result["rows"]]
    title = f"Screen, a proxy: rates within {margin:g} of the best validation accuracy"
    yield title, (*header, f"{fall:g} lost from"), rows, 2
    header = ("", "eigenvalue", "rate", "rank correlation", "orders as low", "needed", "verdict")
    rows = [_pair(one, fall) for one in result["explained"]]
    yield "Does the largest eigenvalue of the Hessian explain it?", header, rows, 3
    kinds = list(dict.fromkeys(one["eigenvalue"] for one in result["explained"]))
    found: dict[tuple[str, str], list[Row]] = {}
    for one in result["eigenvalues"]:
        found.setdefault((name_of(one), one["task"]), []).append(one)
    rows = [(*which, *(_span(one[kind] for one in own) for kind in kinds)) for which, own in found.items()]
    yield "Largest eigenvalues, of all seeds", ("choice", "task", *(k.replace("_", " ") for k in kinds)), rows, 2
    rows = [
        (name_of(one), one["task"], f"{one['learning_rate']:g}", f"{one['mean_pct']}", f"{one['at_chance_count']}")
        for one in result["curves"]
    ]
    yield "Every rate", ("choice", "task", "rate", "validation accuracy, %", "seeds at chance"), rows, 3


def _range(row: Row) -> tuple[str, ...]:
    ends, times = row["ends_with_grid"], row["times"]
    more = " or more" * row["interval_ends_with_grid"]
    return (
        name_of(row),
        row["task"],
        f"{row['best_pct']}",
        f"{'at most ' * ('low' in ends)}{row['low_rate']:g}",
        f"{'at least ' * ('high' in ends)}{row['high_rate']:g}",
        f"{'at least ' * bool(ends)}{times['mean']:g} ({times['low']:g} to {times['high']:g}{more})",
        _ratio(row),
        cell(row.get("could_have_seen")),
        row.get("word", ""),
        "not reached" if row["fall_rate"] is None else f"{row['fall_rate']:g}",
    )


def _pair(one: dict[str, Any], fall: float) -> tuple[str, ...]:
    return (
        "registered" if one["registered"] else "",
        one["eigenvalue"].replace("_", " "),
        "upper end" if one["rate"] == "high" else f"{fall:g} lost from",
        cell({key: one[key] for key in ("rho", "low", "high")}) if one["rho"] is not None else "",
        cell(one["p_value"]),
        cell(one["needed"]),
        one["word"],
    )


def _span(values: Iterator[float]) -> str:
    found = list(values)
    return f"{min(found):g} to {max(found):g}"


def wider(result: Result) -> Said:
    """By the widths of the default's range of rates and of LoRA's on each task; others stand beside."""
    of_word = {"wider": CONFIRMED, "narrower": ABSENT, "equal": ABSENT}
    for task in result["setting"]["tasks"]:
        rows = {name_of(row): row for row in result["rows"] if row["task"] == task and "over_lora" in row}
        ours = rows.pop("default", None)
        if ours is not None:
            beside = "".join(f"; {name} {_ratio(row)}, {row['word']}" for name, row in rows.items())
            seeds = len(result["setting"]["seeds"])
            yield (
                of_word.get(ours["word"], UNRESOLVED),
                (
                    f"screen, a proxy, {task}: width over LoRA's, default {_ratio(ours)}, {ours['word']}; {seeds} "
                    f"seeds would have shown {ours['could_have_seen']:g} times{beside}"
                ),
            )


def _ratio(row: Row) -> str:
    """Nothing for LoRA itself; what is at least so wide, or at most, since a range ends with the grid, says so."""
    bound = row.get("ratio_is")
    return f"{bound} " * bool(bound) + cell(row.get("over_lora"))


def explained(result: Result) -> Said:
    """By the registered rank correlation; all choices and tasks of one result, since pieces have too few."""
    found = next(one for one in result["explained"] if one["registered"])
    if found["rho"] is not None:
        choices = len(result["rows"]) // len(result["setting"]["tasks"])
        needed = "none could be" if found["needed"] is None else f"{found['needed']} or less would be"
        yield (
            {"explains": CONFIRMED, "does not explain": ABSENT}.get(found["word"], UNRESOLVED),
            (
                "screen, a proxy: rank correlation of the adapter's eigenvalue with the upper end of the range "
                f"{found['rho']:+} ({found['low']:+} to {found['high']:+}), {choices} choices on "
                f"{', '.join(result['setting']['tasks'])}; {100 * found['p_value']:.1f} % of their orders give as "
                f"low a value ({needed} no luck)"
            ),
        )
