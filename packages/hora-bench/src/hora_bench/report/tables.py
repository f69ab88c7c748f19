"""Tables and plots of each experiment, from its result alone: what a command prints and what a page shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from hora_bench.report import comparisons, ranges, robustness
from hora_bench.report.rows import COMPARISONS
from hora_bench.report.writing import cell
from hora_bench.stats import MARGIN
from hora_bench.terminal import show_table

Result = dict[str, Any]
Records = Sequence[dict[str, Any]]
WAYS: Final = ("forward", "backward")
UNITS: Final = ("", " K", " M", " G", " T", " P")


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text.

    Attributes
    ----------
    title, header, rows
        What stands over it, the names of its columns, its cells.
    keys
        So many leading columns name a row.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    keys: int = 1


def tables(experiment: str, result: Result) -> list[Table]:
    """The tables of an experiment's result."""
    return list(TABLES[experiment](result))


def notes(result: Result) -> list[str]:
    """What an experiment says beside its numbers: how to read them, and their limits."""
    return result.get("notes", result.get("limits", []))


def show(console: Console, experiment: str, result: Result, file: Path) -> None:
    """Print the tables and notes of a result, and the file that it is in."""
    show_tables(console, tables(experiment, result))
    for note in notes(result):
        console.print(f"- {note}", highlight=False)
    console.print(f"[dim]{file}[/dim]")


def show_tables(console: Console, found: Sequence[Table]) -> None:
    """Print tables, each as wide as the terminal allows."""
    for one in found:
        show_table(console, one.title, one.header, one.rows, keys=one.keys)


def plots(experiment: str, result: Result, folder: Path, stem: str) -> list[Path]:
    """Draw the plots of an experiment into `folder`; their names begin with `stem`."""
    if experiment in COMPARISONS:
        return comparisons.plot(result, folder, stem=stem)
    if experiment not in ("similarity", "signal", "rates", "theory", "robustness"):
        return []
    return import_module(f"hora_bench.experiments.{experiment}.plot").plot(result, folder, stem=stem)


def _records(title: str, records: Records, keys: str, values: str) -> Iterator[Table]:
    """A table of those of the named fields that any record has; results of earlier versions have fewer."""
    if records:
        first = [name for name in keys.split() if any(name in record for record in records)]
        names = first + [name for name in values.split() if any(name in record for record in records)]
        yield Table(title, names, [[cell(record.get(name)) for name in names] for record in records], len(first))


def _cost(result: Result) -> Iterator[Table]:
    rows = [
        (step["step"], readable(step["macs"]), readable(step["paper_macs"]))
        if "macs" in step
        else (step["step"], f"{step['params_count']:,} ({step['params_pct']} %)", f"{step['paper_params_pct']} %")
        for step in result["paper"]
    ]
    yield Table("Where 41.32 G against 6.63 G comes from", ("LLaMA-7B, one token, rank 32", "MACs", "paper"), rows)
    for model in result["models"]:
        yield _cost_of(model, result)
    yield from _agreement(result)


def _cost_of(model: dict[str, Any], result: Result) -> Table:
    """A method and route per row: parameters, and what a training step costs more, per workload.

    The dense route is the paper's accounting and costs every variant the same: shown once.
    """
    of_model = [record for record in result["macs"] if record["model"] == model["model"]]
    loads = sorted({record["tokens"] for record in of_model})
    rows = []
    for counted in (record for record in result["params"] if record["model"] == model["model"]):
        name = counted["method"]
        own = [r for r in of_model if r["method"] == name and (r["route"] != "dense" or name == "hora-paper")]
        size = (f"{counted['params_count']:,}", f"{counted['params_pct']:.3g} %")
        for index, route in enumerate(dict.fromkeys(record["route"] for record in own)):
            shares = [f"+{record['added_train_pct']:.3g} %" for record in own if record["route"] == route]
            rows.append(("" if index else name, route, *(("", "") if index else size), *shares))
    title = (
        f"{model['model']}, rank {model['rank']}: MACs a training step adds to the frozen model's, at so many tokens"
    )
    return Table(title, ("method", "route", "parameters", "of the model", *map(str, loads)), rows, keys=2)


def _agreement(result: Result) -> Iterator[Table]:
    """What the frameworks count over what is counted by hand, by branch: the range over models and tokens."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for of, prefix, by_hand in (("macs", "torch_added_", "added_"), ("xla", "xla_", "")):
        for record in result[of]:
            if record["route"] == "branch" and f"{prefix}forward_macs" in record:
                counted, expected = (sum(record[f"{p}{way}_macs"] for way in WAYS) for p in (prefix, by_hand))
                ratios.setdefault(record["method"], {}).setdefault(of, []).append(counted / expected)
    if ratios:
        rows = [(method, *(_range(found.get(of, [])) for of in ("macs", "xla"))) for method, found in ratios.items()]
        title = "What the frameworks count over what is counted by hand, by branch, in all models and at all tokens"
        yield Table(title, ("method", "torch: whole models", "XLA: the projections of a layer"), rows)


def _range(values: list[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}" if values else ""


def _theory(result: Result) -> Iterator[Table]:
    yield identification(result["identify"])
    slopes = [
        (
            f"{record['fitted_heads']} heads, {record['sharing']}, {record['loss']}",
            *(f"{record[s]['slope']:+.2f} {_interval(record[s]['slope_interval'])}" for s in ("mean", "median")),
        )
        for record in result["curves"]
    ]
    yield Table("Log-log slopes", ("fitted, sharing, loss", "of the mean", "of the median"), slopes)
    judged = judged_gates(result)
    if judged:
        rows = [
            (
                one["gate"],
                f"{one['difference']:+.3f} {_interval((one['low'], one['high']))}",
                _bounds(*one["bounds"]),
                one["outcome"],
            )
            for one in judged
        ]
        yield Table("Gates on differences of slopes, shared less not shared", ("gate", "value", "bounds", ""), rows)


def _activations(result: Result) -> Iterator[Table]:
    rows = [
        (
            one["activation"],
            one["gate"],
            f"{one['difference']:+.3f} {_interval((one['low'], one['high']))}",
            _bounds(*one["bounds"]),
            one["outcome"],
            "{:.0%} and {:.0%}".format(*one["unreached"]),
        )
        for one in result["gates"]
    ]
    header = ("activation", "gate", "value", "bounds", "", "fits above the truth's error, shared and not")
    title = "Gates on differences of slopes, shared less not shared, by the activation of the generator"
    yield Table(title, header, rows, keys=2)


def judged_gates(result: Result) -> list[dict[str, Any]]:
    """Gates of a result, judged anew from its trials: files of earlier versions compared a mean with a median."""
    from hora_bench.experiments.theory.rates import gates

    setting = result["setting"]
    return [] if setting["size"] == "quick" else gates(tuple(setting["sizes"]), result["pieces"])


def _bounds(low: float, high: float) -> str:
    return f"below {high:g}" if low == float("-inf") else f"{low:+g} to {high:+g}"


def identification(records: Records) -> Table:
    """What sharing identifies when two heads are fitted to one, without noise."""
    rows = [
        (
            found["sharing"],
            "invisible" if found["split_order"] is None else f"order {found['split_order']:.2f}",
            f"{found['value_error']:.1e}",
            "yes" if found["identified"] else "no",
        )
        for found in records
    ]
    header = ("sharing", "a split of the value update", "largest error of noise-free fits", "identified")
    return Table("Two heads fitted to one", header, rows)


def _interval(bounds: Any) -> str:
    return "[{:+.2f}, {:+.2f}]".format(*bounds)


def _comparison(result: Result) -> Iterator[Table]:
    header, rows = comparisons.lines_of(result)
    screen = "Screen, a proxy: " if comparisons.proxy_of(result) else ""
    title = f"{'test' if result.get('search') else 'validation'} accuracy"
    yield Table(screen + title if screen else title.capitalize(), header, rows, keys=2)
    if widths := comparisons.widths_of(result):
        margin = result["setting"].get("margin_pct", MARGIN)
        header = ("choice", "data", "best rate", "from", "to", "times")
        seeds = len({trial.get("seed", 0) for trial in result["search"]})
        title = (
            f"Rates within {margin:g} of the best, on validation, {seeds} seeds, without an interval: the best is "
            "chosen without the seed that values it"
        )
        yield Table(title, header, widths, keys=2)
    if result.get("controls"):
        header = ("backend", "method", "accuracy, %", "shuffled, %", "bound of chance, %", "at chance")
        yield Table("Control: shuffled labels", header, [*comparisons.control_lines(result["controls"])], keys=2)


def _similarity(result: Result) -> Iterator[Table]:
    yield from _records("After training", result["trials"], "method seed", "accuracy_pct loss params_count")
    yield from _records(
        "Means over layers and heads",
        result["summary"],
        "method projection",
        "mean_cosine_b mean_cosine_delta participation_ratio generated_share",
    )
    yield from _records(
        "At the start, by parametrisation",
        result["start"],
        "parametrisation",
        "participation_ratio mean_cosine_of_columns",
    )


def _signal(result: Result) -> Iterator[Table]:
    rows = [
        (
            one["task"],
            one["state"],
            str(one["seed"]),
            one["projection"],
            one["measure"].replace("_", " "),
            f"{one['mean']} ({one['low']} to {one['high']})",
            "{} to {}".format(*one["by_chance"]) if "by_chance" in one else "",
        )
        for one in result["summary"]
    ]
    header = ("task", "state", "seed", "projection", "measure", "mean over layers", "by chance")
    yield Table("What heads have in common in the gradient", header, rows, keys=5)


def _ranges(result: Result) -> Iterator[Table]:
    for title, header, rows, keys in ranges.lines_of(result):
        yield Table(title, header, rows, keys)


def _robustness(result: Result) -> Iterator[Table]:
    for title, header, rows in robustness.lines_of(result):
        yield Table(f"Screen, a proxy: {title}", header, rows, keys=3)


def _screen_cost(result: Result) -> Iterator[Table]:
    title = "Processor seconds of a step of 16 images, a seed"
    yield from _records(title, result["rows"], "method contender", "median_s full_over_this")


def _speed(result: Result) -> Iterator[Table]:
    steps = "median_s over_lora over_frozen examples_per_s tokens_per_s peak_mib peak_over_lora"
    yield from _records("Training steps", result["steps"], "backend method", f"{steps} first_step_s compile_s")
    yield from _records("Inference", result["inference"], "backend method form", "median_s over_frozen")
    yield from _records("Operations", result["operations"], "backend method operation", "median_s")
    yield from _records(
        "Starts of A from examples", result.get("starts", []), "backend method batches_count", "median_s over_step"
    )


def readable(count: float | None) -> str:
    """A count with four digits and a unit, or nothing."""
    if count is None:
        return ""
    power = min(len(UNITS) - 1, (len(str(int(count))) - 1) // 3)
    return f"{count / 1000**power:.4g}{UNITS[power]}"


TABLES: Final[dict[str, Callable[[Result], Iterator[Table]]]] = {
    "cost": _cost,
    "theory": _theory,
    "theory-activations": _activations,
    **dict.fromkeys(COMPARISONS, _comparison),
    "similarity": _similarity,
    "signal": _signal,
    "rates": _ranges,
    "speed": _speed,
    "screen-cost": _screen_cost,
    "robustness": _robustness,
}
