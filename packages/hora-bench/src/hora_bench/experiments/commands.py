"""``sweep``, ``similarity``, ``speed`` and ``report``: an experiment file in, one result file out."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from hora_bench.experiments.files import experiment_file
from hora_bench.report.tables import plots, show
from hora_bench.request import vary
from hora_bench.seeds import seeds_of
from hora_bench.store import Journal, check_writable, write_experiment
from hora_bench.sweep import Sweep, read_setting

File = Annotated[
    Path | None,
    typer.Argument(help="A file of your own, or the name of one of this package.", parser=experiment_file),
]
Quick = Annotated[bool, typer.Option("--quick", help="No file: a small setting on the embedded digits.")]
Data = Annotated[Path | None, typer.Option(help="Folder of tasks.", exists=True)]

QUICK: Final[dict[str, dict[str, Any]]] = {
    "sweep": {"factors": {"residual": [True], "activation": ["tanh"]}, "references": ["lora"], "seeds": [0, 1]},
    "similarity": {"methods": ["lora", "mh-lora", "hora"]},
    "speed": {"torch": ["linear-probe", "lora", "hora"], "jax": ["linear-probe", "hora"], "rounds": 2},
}

console = Console()


def sweep(
    file: File = None,
    *,
    quick: Quick = False,
    data: Data = None,
    seeds: Annotated[str | None, typer.Option(help="In place of the file's: 0-19 or 0,1,2.")] = None,
    out: Annotated[Path | None, typer.Option(help="Result file; results/NAME.json when left out.")] = None,
) -> None:
    """Choices that differ in one thing, with paired differences: ablations, curves, tuned comparisons, controls."""
    from hora_bench.sweep import sweep as run

    setting = read_setting(file, quick=QUICK["sweep"] if quick else None, data=data)
    asked = Sweep.of(setting.vary)
    asked = replace(asked, seeds=seeds_of(seeds)) if seeds else asked
    out = out or Path("results", f"{file.stem if file else 'sweep'}.json")
    flags = f" --seeds {shlex.quote(seeds)}" if seeds else ""
    with _timed("sweep", file, out, flags) as (progress, finish):
        command = _command("sweep", file, flags)
        result = finish(run(setting, out.parent / "runs", asked, command=command, progress=progress))
    plots("sweep", result, out.parent, out.stem)
    show(console, "sweep", result, out)


def similarity(
    file: File = None,
    *,
    quick: Quick = False,
    data: Data = None,
    out: Annotated[Path, typer.Option()] = Path("results/similarity.json"),
) -> None:
    """How alike the heads' updates are after training, and how many directions they use."""
    from hora_bench.experiments.similarity.run import similarity as run

    setting = read_setting(file, quick=QUICK["similarity"] if quick else None, data=data)
    journal = Journal(out.with_suffix(".pieces.jsonl"))
    with _timed("similarity", file, out) as (progress, finish):
        result = finish(run(setting, **setting.vary, journal=journal, progress=progress))
    journal.remove()
    plots("similarity", result, out.parent, out.stem)
    show(console, "similarity", result, out)


def speed(
    file: File = None,
    *,
    quick: Quick = False,
    data: Data = None,
    cpu_clock: Annotated[
        bool, typer.Option("--cpu-clock", help="Count processor seconds: for a machine that others use too.")
    ] = False,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to measure; cuda is the first GPU.")] = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Of the frozen weights of a language model.")
    ] = None,
    out: Annotated[Path, typer.Option()] = Path("results/speed.json"),
) -> None:
    """Steps, memory, inference, generation, merging and export, every method on both backends."""
    from hora_bench.experiments.speed.run import speed as run

    setting = read_setting(file, quick=QUICK["speed"] if quick else None, data=data)
    if dtype is not None:
        setting = replace(setting, base=vary(setting.base, dtype=dtype))
    flags = " --cpu-clock" * cpu_clock + f" --device {device}" * (device != "cpu") + f" --dtype {dtype}" * bool(dtype)
    with _timed("speed", file, out, flags) as (progress, finish):
        clock = "cpu" if cpu_clock else "wall"
        result = finish(run(setting, **setting.vary, clock=clock, device=device, progress=progress))
    show(console, "speed", result, out)


def report(
    results: Annotated[Path, typer.Argument(help="Folder of result files.", exists=True)] = Path("results"),
    *,
    out: Annotated[
        Path, typer.Option(help="The page: .md, with plots in a folder beside it, or .html, one file.")
    ] = Path("results/benchmarks.html"),
) -> None:
    """A page of tables, plots and verdicts on the paper's claims, from result files alone."""
    from hora_bench.report.page import write_page

    check_writable(out.parent)
    for path in write_page(results, out):
        console.print(path)


def _command(name: str, file: Path | None, flags: str = "") -> str:
    return f"hora-bench {name}" + (f" experiments/{file.name} --data FOLDER" if file else " --quick") + flags


@contextmanager
def _timed(
    name: str, file: Path | None, out: Path, flags: str = ""
) -> Generator[tuple[Callable[..., None], Callable[[Any], Any]]]:
    """A progress callback, and a function that writes the result with the time it took."""
    check_writable(out.parent)
    started = time.perf_counter()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeRemainingColumn())

    def finish(result: dict[str, Any]) -> dict[str, Any]:
        seconds = time.perf_counter() - started
        write_experiment(out, name, _command(name, file, flags), seconds=seconds, result=result)
        return result

    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=None)
        yield (lambda done, total: progress.update(task, completed=done, total=total)), finish
