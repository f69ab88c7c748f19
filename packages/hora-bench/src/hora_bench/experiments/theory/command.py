"""``hora-bench theory``."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from hora_spec import HoraError
from rich.console import Console
from rich.progress import Progress

from hora_bench.report.tables import identification, plots, show, show_tables
from hora_bench.store import Journal, check_writable, write_experiment
from hora_bench.versions import sources_sha256

console = Console()


def command(
    part: Annotated[
        Literal["identify", "rates"], typer.Argument(help="identify takes seconds; rates contains it.")
    ] = "rates",
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds; gates are not judged.")] = False,
    full: Annotated[bool, typer.Option("--full", help="More samples, trials and sharings; some 20 minutes.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of problems, samples and starts.")] = 0,
    out: Annotated[Path, typer.Option(help="Result file; the plot goes beside it.")] = Path("results/theory.json"),
) -> None:
    """The paper's theorems as a regression: what sharing identifies, and how fast it is recovered."""
    if quick and full:
        raise HoraError("theory is quick or full, got both: drop one")
    if part == "identify" and (quick or full):
        raise HoraError("identify has one size, got --quick or --full: drop it")
    from .identify import identify
    from .model import SHARINGS
    from .run import theory

    if part == "identify":
        show_tables(console, [identification([_record(identify(sharing, seed=seed)) for sharing in SHARINGS])])
        return
    size = "full" if full else "quick" if quick else "default"
    started = time.perf_counter()
    check_writable(out.parent)
    journal = Journal(out.with_suffix(".pieces.jsonl"), sources_sha256(Path(__file__).parent))
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("fits")
        result = theory(
            size,
            seed=seed,
            journal=journal,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    flags = "" if size == "default" else f" --{size}"
    write_experiment(
        out,
        "theory",
        f"hora-bench theory rates{flags} --seed {seed}",
        seconds=time.perf_counter() - started,
        result=result,
    )
    plots("theory", result, out.parent, out.stem)
    journal.remove()
    show(console, "theory", result, out)
    if any(gate["outcome"] == "failed" for gate in result["gates"]):
        raise typer.Exit(1)


def _record(found: Any) -> dict[str, Any]:
    return {**asdict(found), "identified": found.identified}
