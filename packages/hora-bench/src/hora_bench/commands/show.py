"""``hora-bench show``."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer
from hora_spec import HoraError
from rich.console import Console

from hora_bench import store
from hora_bench.store import RunResult
from hora_bench.terminal import show_table

console = Console()
NOTE = (
    "Accuracy: mean over seeds, with the lowest and highest in brackets. Each row comes from one file per seed; "
    "the files carry the command, the versions and the machine."
)
HEADER = ("task", "model", "method", "backend", "data", "lr", "accuracy", "seeds", "trained", "step", "final loss")


def command(
    directory: Annotated[Path, typer.Argument(help="Where the result files are.")] = Path("results/runs"),
    *,
    trials: Annotated[bool, typer.Option("--trials", help="Also the runs of the searches.")] = False,
    page: Annotated[Path | None, typer.Option(help="Write a page with table and loss curves here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Tabulate and plot any set of result files; runs that differ in the seed alone become one row."""
    found = [run for run in store.read_all(directory) if trials or run.request.score_on == "test"]
    if not found:
        raise HoraError(f"{directory} must hold result files, got none: run hora-bench run TASK --out {directory}")
    rows = [_row(group) for group in _grouped(found)]
    if as_json:
        print(json.dumps([dict(zip(HEADER, row, strict=True)) for row in rows]))
        return
    show_table(console, f"{len(found)} runs in {directory}", HEADER, rows, keys=4)
    path = page or directory / "runs.html"
    _write_page(path, rows, found)
    console.print(f"[dim]{path}[/dim]")


def _grouped(found: list[RunResult]) -> list[list[RunResult]]:
    groups = defaultdict(list)
    for run in found:
        groups[run.request.model_copy(update={"seed": 0}).model_dump_json()].append(run)
    return [groups[key] for key in sorted(groups)]


def _row(group: list[RunResult]) -> tuple[str, ...]:
    first = group[0]
    request = first.request
    accuracies = [run.scores.accuracy_pct for run in group]
    mean = sum(accuracies) / len(accuracies)
    spread = f" [{min(accuracies):.1f}, {max(accuracies):.1f}]" if len(group) > 1 else ""
    return (
        request.task,
        f"{request.model}, {request.proxy}" if request.proxy else request.model,
        request.method,
        request.backend,
        f"{100 * request.fraction:g} %" + (f", at most {request.limit}" if request.limit else ""),
        f"{request.learning_rate:g}" + (" (tuned)" if first.trials else ""),
        f"{mean:.2f} %{spread}",
        ", ".join(str(run.request.seed) for run in group),
        f"{first.trained_params_count:,}",
        f"{1000 * first.measured.step_time_s:.0f} ms",
        f"{sum(run.loss[-1] for run in group) / len(group):.4f}",
    )


def _file(run: RunResult) -> str:
    return run.name if run.inputs else f"{run.request.task}, of an earlier version"


def _write_page(path: Path, rows: list[tuple[str, ...]], found: list[RunResult]) -> None:
    from matplotlib.figure import Figure

    from hora_bench.report.writing import drawn, image, plain, table, write_html

    cells = [[plain(value) for value in row] for row in rows]
    lines = ["# HoRA runs", "", f"{len(found)} result files.", *table(HEADER, cells), NOTE]
    for task in dict.fromkeys(run.request.task for run in found):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.subplots()
        for run in (run for run in found if run.request.task == task):
            request = run.request
            axes.plot(run.loss, label=f"{request.method} {request.backend} seed {request.seed}", linewidth=1)
        axes.set(xlabel="step", ylabel="training loss")
        axes.legend(frameon=False, fontsize=7)
        lines += image(f"Training loss on {plain(task)}.", drawn(figure))
    commands = [(plain(_file(run)), plain(run.command)) for run in found]
    write_html(path, "HoRA runs", [*lines, "## Commands", *table(("file", "command"), commands)])
