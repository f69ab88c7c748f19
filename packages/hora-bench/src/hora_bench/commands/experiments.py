"""The commands of the paper's experiments: each makes one result file, and ``report`` the pages from all of them."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from hora_spec import HoraError
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from hora_bench import experiments
from hora_bench.choices import Sweep
from hora_bench.experiments.cost.architectures import MODELS
from hora_bench.experiments.files import experiment_file
from hora_bench.report.tables import identification, plots, show, show_tables
from hora_bench.request import seeds_of, vary
from hora_bench.setting import Setting, arguments_of, read_setting
from hora_bench.store import Journal, check_file, write_experiment
from hora_bench.versions import sources_sha256

File = Annotated[
    Path | None,
    typer.Argument(help="A file of your own, or the name of one of this package.", parser=experiment_file),
]
Quick = Annotated[bool, typer.Option("--quick", help="No file: a small setting on the embedded digits.")]
Data = Annotated[Path | None, typer.Option(help="Folder of tasks.", exists=True)]
OneTask = Annotated[str | None, typer.Option(help="In place of the file's: one of its tasks, as a piece.")]

QUICK: Final[dict[str, dict[str, Any]]] = {
    "sweep": {"factors": {"residual": [True], "activation": ["tanh"]}, "references": ["lora"], "seeds": [0, 1]},
    "robustness": {
        "methods": ["lora", "hora"],
        "search": [3e-3, 1e-2],
        "search_seeds": [2],
        "seeds": [0, 1],
        "corruptions": {"noise": [40], "blur": [2], "contrast": [0.3], "jpeg": [10]},
        "attack": {"epsilon": 2, "steps": 2, "images": 20},
        "images": 50,
    },
    "similarity": {"methods": ["lora", "mh-lora", "hora"]},
    "signal": {"methods": ["linear-probe"], "batches": 6},
    "rates": {
        "methods": ["lora", "hora-joint"],
        "rates": [1e-3, 4e-3, 1.6e-2, 6.4e-2],
        "seeds": [0, 1],
        "hessian_seeds": 1,
    },
    "speed": {"torch": ["linear-probe", "lora", "hora"], "jax": ["linear-probe", "hora"], "rounds": 2},
}

console = Console()


def sweep(
    file: File = None,
    *,
    quick: Quick = False,
    data: Data = None,
    seeds: Annotated[str | None, typer.Option(help="In place of the file's: 0-19 or 0,1,2.")] = None,
    task: OneTask = None,
    out: Annotated[Path | None, typer.Option(help="Result file; results/NAME.json when left out.")] = None,
) -> None:
    """Choices that differ in one thing, with paired differences: ablations, curves, tuned comparisons, controls."""
    from hora_bench.sweep import sweep as run

    setting = read_setting(file, quick=QUICK["sweep"] if quick else None, data=data)
    asked = Sweep.of(setting.vary)
    asked = asked.with_seeds(seeds_of(seeds)) if seeds else asked
    setting, asked = _piece(setting, asked, task)
    out = out or _file_of("sweep", file, task)
    flags = (f" --seeds {shlex.quote(seeds)}" if seeds else "") + (f" --task {shlex.quote(task)}" if task else "")
    command = _command("sweep", file, flags)
    with _timed("sweep", command, out) as (progress, finish):
        finish(run(setting, out.parent / "runs", asked, command=command, progress=progress))


def robustness(
    file: File = None,
    *,
    quick: Quick = False,
    data: Data = None,
    task: OneTask = None,
    out: Annotated[Path | None, typer.Option(help="Result file; results/NAME.json when left out.")] = None,
) -> None:
    """What is kept under corruptions and adversarial steps, by choices that each have their own rate, beside LoRA."""
    from hora_bench.experiments.robustness.run import Plan
    from hora_bench.experiments.robustness.run import robustness as run

    setting = read_setting(file, quick=QUICK["robustness"] if quick else None, data=data)
    setting = replace(setting, base=vary(setting.base, last_blocks=4)) if quick else setting
    plan = Plan.of(setting.vary)
    setting, sweep = _piece(setting, plan.sweep, task)
    out = out or _file_of("robustness", file, task)
    command, journal = _command("robustness", file, f" --task {shlex.quote(task)}" if task else ""), _journal(out)
    with _timed("robustness", command, out) as (progress, finish):
        plan = replace(plan, sweep=sweep)
        finish(run(setting, out.parent / "runs", plan, command=command, journal=journal, progress=progress))
    journal.remove()


def _piece(setting: Setting, asked: Sweep, task: str | None) -> tuple[Setting, Sweep]:
    """One of a file's tasks in place of all, where one is named."""
    if task is None:
        return setting, asked
    if task not in asked.tasks:
        known = ", ".join(asked.tasks) or "none"
        raise HoraError(f"a piece is one of the file's tasks, {known}, got {task!r}: name one, or leave it out")
    return replace(setting, base=vary(setting.base, task=task)), replace(asked, tasks=())


def _file_of(name: str, file: Path | None, task: str | None) -> Path:
    """Where the result of a file, or of its piece, goes unless said."""
    stem = f"{file.stem if file else name}{f'-{task}' if task else ''}"
    return Path("results", f"{stem.replace('_', '-')}.json")


def similarity(
    file: File = None,
    *,
    quick: Quick = False,
    data: Data = None,
    out: Annotated[Path, typer.Option()] = Path("results/similarity.json"),
) -> None:
    """How alike the heads' updates are after training, and how many directions they use."""
    from hora_bench.experiments.similarity.run import similarity as run

    _pieces("similarity", run, ("methods", "seeds"), file, quick=quick, data=data, out=out)


def signal(
    file: File = None,
    *,
    quick: Quick = False,
    data: Data = None,
    out: Annotated[Path, typer.Option()] = Path("results/signal.json"),
) -> None:
    """What heads have in common in the gradient, on disjoint batches: similarity, and what they read and write."""
    from hora_bench.experiments.signal.run import signal as run

    _pieces("signal", run, ("tasks", "methods", "seeds", "batches", "rank"), file, quick=quick, data=data, out=out)


def rates(
    file: File = None,
    *,
    quick: Quick = False,
    data: Data = None,
    task: OneTask = None,
    out: Annotated[Path | None, typer.Option(help="Result file; results/NAME.json when left out.")] = None,
) -> None:
    """How wide the range of good learning rates is, and whether the curvature at the start explains it."""
    from hora_bench.experiments.rates.run import rates as run

    setting = read_setting(file, quick=QUICK["rates"] if quick else None, data=data)
    setting = replace(setting, base=vary(setting.base, last_blocks=2, device="cpu")) if quick else setting
    varied = ("methods", "variants", "tasks", "rates", "seeds", "hessian_seeds", "margin", "fall")
    arguments = arguments_of(setting.vary, run, *varied)
    if missing := sorted({"rates", "seeds"} - set(arguments)):
        raise HoraError(f"curves are of rates and seeds in [vary], got no {' and no '.join(missing)}: add them")
    setting, asked = _piece(setting, Sweep(tasks=arguments.pop("tasks", ())), task)
    out = out or _file_of("rates", file, task)
    command = _command("rates", file, f" --task {shlex.quote(task)}" if task else "")
    with _timed("rates", command, out) as (progress, finish):
        runs = out.parent / "runs"
        finish(run(setting, runs, tasks=asked.tasks, **arguments, command=command, progress=progress))


def _pieces(
    name: str,
    run: Callable[..., dict[str, Any]],
    varied: Sequence[str],
    file: Path | None,
    *,
    quick: bool,
    data: Path | None,
    out: Path,
) -> None:
    """An experiment whose finished pieces are kept beside its result until it is whole."""
    setting = read_setting(file, quick=QUICK[name] if quick else None, data=data)
    arguments = arguments_of(setting.vary, run, *varied)
    journal = _journal(out)
    with _timed(name, _command(name, file), out) as (progress, finish):
        finish(run(setting, **arguments, journal=journal, progress=progress))
    journal.remove()


def _journal(out: Path) -> Journal:
    """Of the pieces of a result, by the code that measures them now."""
    return Journal(out.with_suffix(".pieces.jsonl"), sources_sha256(Path(experiments.__file__).parent))


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
    arguments = arguments_of(setting.vary, run, "torch", "jax", "seq", "rounds")
    flags = " --cpu-clock" * cpu_clock + f" --device {device}" * (device != "cpu") + f" --dtype {dtype}" * bool(dtype)
    with _timed("speed", _command("speed", file, flags), out) as (progress, finish):
        clock = "cpu" if cpu_clock else "wall"
        finish(run(setting, **arguments, clock=clock, device=device, progress=progress))


def report(
    results: Annotated[Path, typer.Argument(help="Folder of result files.", exists=True)] = Path("results"),
    *,
    out: Annotated[
        Path, typer.Option(help="The page: .md, with plots in a folder beside it, or .html, one file.")
    ] = Path("results/benchmarks.html"),
) -> None:
    """A page of tables, plots and verdicts on the paper's claims, from result files alone."""
    from hora_bench.report.page import write_page

    check_file(out)
    for path in write_page(results, out):
        console.print(path)


def _command(name: str, file: Path | None, flags: str = "") -> str:
    return f"hora-bench {name}" + (f" experiments/{file.name} --data FOLDER" if file else " --quick") + flags


@contextmanager
def _timed(name: str, command: str, out: Path) -> Generator[tuple[Callable[..., None], Callable[[Any], None]]]:
    """A progress callback, and a function that writes a result with the time it took, draws and prints it."""
    check_file(out)
    started = time.perf_counter()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=None)

        def finish(result: dict[str, Any]) -> None:
            write_experiment(out, name, command, seconds=time.perf_counter() - started, result=result)
            progress.stop()
            plots(name, result, out.parent, out.stem)
            show(console, name, result, out)

        yield (lambda done, total: progress.update(task, completed=done, total=total)), finish


def cost(
    model: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(MODELS)}; all when left out.")] = None,
    *,
    rank: Annotated[int | None, typer.Option(min=1, help="Of every method; 8 for vision, 32 for language.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="By hand alone, without the frameworks' counters.")] = False,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("results/cost.json"),
) -> None:
    """Parameters and multiply-accumulates of every method on ViT and LLaMA, without weights."""
    if unknown := set(model or ()) - set(MODELS):
        raise typer.BadParameter(f"models are {', '.join(MODELS)}, got {', '.join(sorted(unknown))}")
    from hora_bench.experiments.cost.run import cost as run

    flags = "".join([*(f" --model {m}" for m in model or ()), f" --rank {rank}" * bool(rank), " --quick" * quick])
    with _timed("cost", f"hora-bench cost{flags}", out) as (progress, finish):
        finish(run(model or tuple(MODELS), rank=rank, torch=not quick, xla=not quick, progress=progress))


def theory(
    part: Annotated[
        Literal["identify", "rates", "activations"],
        typer.Argument(help="identify takes seconds; rates contains it; activations: of the generator, 10 minutes."),
    ] = "rates",
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds; gates are not judged.")] = False,
    full: Annotated[bool, typer.Option("--full", help="More samples, trials and sharings; some 20 minutes.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of problems, samples and starts.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="results/theory.json, or theory-activations.json; the plot goes beside it.")
    ] = None,
) -> None:
    """The paper's theorems as a regression: what sharing identifies, and how fast it is recovered."""
    if quick and full:
        raise HoraError("theory is quick or full, got both: drop one")
    if part != "rates" and (quick or full):
        raise HoraError(f"{part} has one size, got --quick or --full: drop it")
    from hora_bench.experiments.theory import model
    from hora_bench.experiments.theory.identify import identify
    from hora_bench.experiments.theory.rates import activations
    from hora_bench.experiments.theory.rates import theory as rates

    if part == "identify":
        show_tables(console, [identification([_record(identify(sharing, seed=seed)) for sharing in model.SHARINGS])])
        return
    size = "full" if full else "quick" if quick else "default"
    name = "theory" if part == "rates" else "theory-activations"
    out = out or Path("results", f"{name}.json")
    flags = "" if size == "default" else f" --{size}"
    journal, run = _journal(out), partial(rates, size) if part == "rates" else activations
    with _timed(name, f"hora-bench theory {part}{flags} --seed {seed}", out) as (progress, finish):
        finish(result := run(seed=seed, journal=journal, progress=progress))
    journal.remove()
    if part == "rates" and any(gate["outcome"] == "failed" for gate in result["gates"]):
        raise typer.Exit(1)


def _record(found: Any) -> dict[str, Any]:
    return {**asdict(found), "identified": found.identified}
