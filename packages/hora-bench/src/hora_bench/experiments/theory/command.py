"""``hora-bench theory``."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hora_bench.experiments.journal import Journal
from hora_bench.experiments.record import write_record

console = Console()


def command(
    part: Annotated[
        Literal["identify", "rates"], typer.Argument(help="identify takes seconds; rates contains it.")
    ] = "rates",
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds; gates are not judged.")] = False,
    full: Annotated[bool, typer.Option("--full", help="More samples, trials and sharings; about an hour.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of problems, samples and starts.")] = 0,
    out: Annotated[Path, typer.Option(help="Result file; the plot goes beside it.")] = Path("results/theory.json"),
) -> None:
    """The paper's theorems as a regression: what sharing identifies, and how fast it is recovered."""
    from .identify import identify
    from .model import SHARINGS
    from .plot import plot
    from .run import theory

    if part == "identify":
        _show_identification([_record(identify(sharing, seed=seed)) for sharing in SHARINGS])
        return
    size = "full" if full else "quick" if quick else "default"
    started = time.perf_counter()
    journal = Journal(out.with_suffix(".pieces.jsonl"))
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("fits")
        result = theory(
            size,
            seed=seed,
            journal=journal,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    flags = "" if size == "default" else f" --{size}"
    write_record(
        out,
        "theory",
        f"hora-bench theory rates{flags} --seed {seed}",
        seconds=time.perf_counter() - started,
        result=result,
    )
    plot(result, out.with_suffix(".svg"))
    journal.remove()
    show(result)
    console.print(f"[dim]{out} and {out.with_suffix('.svg')}[/dim]")
    if not all(gate["passed"] for gate in result["gates"]):
        raise typer.Exit(1)


def show(result: dict[str, Any]) -> None:
    """Print identification, slopes, gates and limits of a result."""
    _show_identification(result["identify"])
    table = Table("fitted heads", "sharing", "loss", "slope of the mean", "slope of the median", title="log-log slopes")
    for record in result["curves"]:
        cells = (f"{record[s]['slope']:+.2f} {_interval(record[s]['slope_interval'])}" for s in ("mean", "median"))
        table.add_row(str(record["fitted_heads"]), record["sharing"], record["loss"], *cells)
    console.print(table)
    if result["gates"]:
        table = Table("gate", "value", "bounds", "", title="gates")
        for gate in result["gates"]:
            verdict = "passed" if gate["passed"] else "[red]failed[/red]"
            table.add_row(gate["gate"], f"{gate['value']:+.3f}", _interval((gate["low"], gate["high"])), verdict)
        console.print(table)
    console.print("limits", style="bold")
    for limit in result["limits"]:
        console.print(f"- {limit}", highlight=False)


def _show_identification(records: list[dict[str, Any]]) -> None:
    from .identify import SPLITS

    title = "two heads for one, no noise: which split of the value update changes the function"
    table = Table("sharing", f"change at a split of {SPLITS[-1]:g}", "order", "value error", "identified", title=title)
    for found in records:
        table.add_row(
            found["sharing"],
            f"{found['split_change'][-1]:.1e}",
            "invisible" if found["split_order"] is None else f"{found['split_order']:.2f}",
            f"{found['value_error']:.1e}",
            "yes" if found["identified"] else "no",
        )
    console.print(table)


def _record(found: Any) -> dict[str, Any]:
    return {**asdict(found), "identified": found.identified}


def _interval(bounds: Any) -> str:
    return "[{:+.2f}, {:+.2f}]".format(*bounds)
