"""``hora-bench run``."""

import json
import math
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from hora_spec import HoraError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hora_bench import configs
from hora_bench.data.catalog import FAMILIES, Named, find, load_task

console = Console()
TASKS = ", ".join(FAMILIES)
PLANNED = {"task", "data", "backend", "model", "method", "option", "batch_size", "image_size", "dtype", "mesh"}
PLANNED |= {"config", "dry_run", "remat", "seed", "seeds", "tune", "tune_lr", "tune_wd"}  # what a plan depends on


def _configure(context: typer.Context, name: str | None) -> str | None:
    """Options of a configuration become defaults, so that the command line still wins."""
    if name is not None:
        options = configs.read(name)["options"]
        known = {parameter.name for parameter in context.command.params} - {"config"}
        if unknown := sorted(set(options) - known):
            raise HoraError(f"options of a configuration are those of run, got {', '.join(unknown)}: see run --help")
        context.default_map = {**(context.default_map or {}), **options}
    return name


def command(
    context: typer.Context,
    task: Annotated[
        str,
        typer.Argument(help=f"A folder, a .jsonl file, or one of {TASKS}; vtab/NAME for one of a suite."),
    ],
    data: Annotated[Path | None, typer.Argument(help="Folder, archive or file with the data of a named task.")] = None,
    *,
    backend: Annotated[Literal["torch", "jax"], typer.Option(help="Framework.")] = "torch",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto is a GPU where there is one.")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="Asset, directory, timm name or hub name; default the protocol's.")
    ] = None,
    method: Annotated[str, typer.Option(help="See hora-bench methods; several, one run each: hora,lora.")] = "hora",
    option: Annotated[list[str] | None, typer.Option(help="Option of the method, key=value; repeatable.")] = None,
    fraction: Annotated[float, typer.Option(min=0.0, max=1.0, help="Stratified part of the training data.")] = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many examples of every split.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initial values, data order and subset; default 0.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Several, one run each: 0-19 or 0,1,2.")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Choose rate and decay on validation; then test once.")] = False,
    tune_lr: Annotated[str | None, typer.Option(help="Learning rates of the search, comma-separated.")] = None,
    tune_wd: Annotated[str | None, typer.Option(help="Weight decays of the search, comma-separated.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    wd: Annotated[float | None, typer.Option(help="Weight decay.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the full training set.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps, in place of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples in a step.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    scoring: Annotated[
        Literal["log-likelihood", "generation"] | None, typer.Option(help="How answers of language models are judged.")
    ] = None,
    beams: Annotated[int | None, typer.Option(min=1, help="torch: of generated answers; 1 when left out.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of frozen weights; images, sentences: autocast.")
    ] = "float32",
    mesh: Annotated[str | None, typer.Option(help="Devices of JAX, such as fsdp=2,tp=4.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="No weights: parameters, FLOPs and memory per device.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Directory of result files.")] = Path("results/runs"),
    remat: Annotated[bool, typer.Option("--remat", help="JAX: recompute activations, save memory.")] = False,
    scan: Annotated[bool, typer.Option("--scan", help="JAX: one compiled layer, scanned over depth.")] = False,
    config: Annotated[
        str | None,
        typer.Option(help="Options from a file or from llama-7b, llama-13b.", callback=_configure, is_eager=True),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results as JSON, one a line, nothing else.")] = False,
) -> None:
    """Fine-tune a model on a task with a method, and score it; a killed run goes on where it was."""
    given = {**context.params, "mesh": parse_mesh(mesh), "options": _options(option or [])}
    others = os.environ.get("RANK", "0") != "0"  # under accelerate launch one process speaks
    given["as_json"] = as_json and not others
    console.quiet = as_json or others
    named = find(task, data)
    _refuse_idle(context, given, named[0].family.kind)
    given["seeds"] = _seeds(seed, seeds)
    each = [(one, {**given, "method": name}) for name in _methods(method) for one in named]
    for one, own in each:  # before the first of them takes hours
        _request(one, own, task=one.name, scoring=_unread(one, own), steps=(1, 0))
    for one, own in each:
        (_plan if dry_run else _runs)(one, own)
    if len(each) > 1:
        console.print(_told(each) if dry_run else f"{len(each)} tasks and methods done: hora-bench show {out}")
    if dry_run:
        return
    if backend == "torch":
        from hora_bench.backends.torch import exit_if_launched

        exit_if_launched()


def _refuse_idle(context: typer.Context, given: dict[str, Any], kind: str) -> None:
    """Refuse options that would change nothing."""
    source = {name: context.get_parameter_source(name) for name in context.params}
    said = {name for name, where in source.items() if where is not None and where.name == "COMMANDLINE"}
    rules = (
        ({"tune_lr", "tune_wd"}, not given["tune"], "belong to --tune", "add it"),
        ({"lr", "wd"}, given["tune"], "are what --tune chooses", "drop one"),
        ({"epochs"}, given["steps"] is not None, "are another way to say --steps", "drop one"),
        ({"seed"}, given["seeds"] is not None, "is another way to say --seeds", "drop one"),
        ({"scoring", "beams"}, kind != "text", "belong to language models", "leave it out"),
        ({"image_size"}, kind != "images", "belongs to images", "leave it out"),
        (
            set(given) - PLANNED - {"options"},
            given["dry_run"],
            "change nothing of a step's cost",
            "drop --dry-run or it",
        ),
    )
    for names, idle, rule, fix in rules:
        if idle and (found := sorted(said & names)):
            flag = "--json" if found[0] == "as_json" else f"--{found[0].replace('_', '-')}"
            raise HoraError(f"some options {rule}, got {flag}: {fix}")
    if given["epochs"] is not None and not (math.isfinite(given["epochs"]) and given["epochs"] > 0):
        raise HoraError(f"--epochs is a positive number, got {given['epochs']}: write 10")


def _methods(given: str) -> list[str]:
    names = given.split(",")
    if len(set(names)) < len(names):
        raise HoraError(f"--method names each method once, got {given!r}: drop one")
    return names


def _unread(named: Named, given: dict[str, Any]) -> str:
    """How a task is scored, before its data is read."""
    return (given["scoring"] or "log-likelihood") if named.family.kind == "text" else "accuracy"


def _told(each: list[tuple[Named, dict[str, Any]]]) -> str:
    """How many runs a whole command makes."""
    seeds, searched = len(each[0][1]["seeds"]), sum(len(_grid(named, given)) for named, given in each)
    trials = f", and {searched * seeds} trials before them" if searched else ""
    return f"in all {len(each) * seeds} runs of such steps{trials}"


def _grid(named: Named, given: dict[str, Any]) -> list[tuple[float, float]]:
    """Rates and decays that are searched."""
    if not given["tune"]:
        return []
    protocol = named.family.protocol
    rates = _numbers("--tune-lr", given["tune_lr"]) or protocol.tune_learning_rates
    decays = _numbers("--tune-wd", given["tune_wd"]) or protocol.tune_weight_decays
    return [(rate, decay) for rate in sorted(rates) for decay in sorted(decays)]


def _runs(named: Named, given: dict[str, Any]) -> None:
    """Every seed of one task."""
    protocol, size = _protocol(named, given), _image_size(named, given)
    task = load_task(
        named.name,
        data=given["data"],
        model=protocol.model,
        image_size=size,
        scoring=given["scoring"],
        limit=given["limit"],
    )
    steps = protocol.steps(task.size("train+val"), given["epochs"], given["steps"])
    scoring = task.scoring if task.kind == "text" else "accuracy"
    base = _request(named, given, task=task.name, scoring=scoring, steps=steps)
    for seed in given["seeds"]:
        _run(named, base.replace(seed=seed), task, given)


def _request(named: Named, given: dict[str, Any], *, task: str, scoring: Any, steps: tuple[int, int]) -> Any:
    """What the options ask for, in the protocol of the task."""
    from hora_bench import methods
    from hora_bench.request import Request

    protocol = _protocol(named, given)
    method = methods.find(given["method"]).configured(_ranked(given, protocol.rank))
    method.check_backend(given["backend"])
    fields = ("backend", "device", "fraction", "limit", "dtype", "mesh", "remat", "scan")
    return Request(
        task=task,
        model=protocol.model,
        method=method.name,
        options=method.options,
        image_size_px=_image_size(named, given),
        learning_rate=protocol.learning_rate if given["lr"] is None else given["lr"],
        weight_decay=protocol.weight_decay if given["wd"] is None else given["wd"],
        batch_size=protocol.batch_size,
        steps=steps[0],
        warmup_steps=steps[1],
        schedule=protocol.schedule,
        clip_norm=protocol.clip_norm,
        drop_path=protocol.drop_path,
        train_on="train+val",
        score_on="test",
        scoring=scoring,
        beams=given["beams"] or 1,
        **{name: given[name] for name in fields},
    )


def _run(named: Named, request: Any, task: Any, given: dict[str, Any]) -> None:
    """Search if asked to, run, and say what came out."""
    from hora_bench import run as runs
    from hora_bench import search

    out, command_line = given["out"], shlex.join(["hora-bench", *sys.argv[1:]])
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        stages: dict[str, Any] = {}

        def report(stage: str, done: int, total: int, loss: float) -> None:
            if stage not in stages:
                stages[stage] = progress.add_task(f"{task.name} {stage}", total=total, loss="")
            progress.update(stages[stage], completed=done, loss=f"loss {loss:.3f}" if loss else "")

        trials = []
        if given["tune"]:
            request, trials = search.tune(
                request,
                task,
                out,
                grid=_grid(named, given),
                command=command_line,
                progress=report,
            )
        result = runs.run(request, task, out, command=command_line, trials=trials, progress=report)
    if given["as_json"]:
        print(result.model_dump_json())
        return
    _tell(result, out)
    if edge := search.edge_of(trials, request.learning_rate):
        console.print(
            f"  the best rate is the {edge} that was tried, a better one may lie beyond: --tune-lr", style="yellow"
        )


def _tell(result: Any, out: Path) -> None:
    request, scores, measured = result.request, result.scores, result.measured
    console.print(
        f"[bold]{request.task}[/bold] {request.method} on {request.backend}, seed {request.seed}: "
        f"{scores.accuracy_pct:.2f} % ({scores.correct_count} of {scores.total_count}), loss {scores.loss:.4f}, "
        f"{result.trained_params_count:,} trained parameters, {1000 * measured.step_time_s:.0f} ms a step, "
        f"lr {request.learning_rate:g}"
    )
    for group, accuracy in scores.groups_pct.items():
        console.print(f"  {group}: {accuracy:.1f} %")
    if cut := result.data.get("cut_count"):
        said = f"  {cut} sentences of all splits were cut at {result.data['cutoff_tokens']} tokens"
        console.print(said, style="yellow")
    if result.unreadable_images:
        console.print(f"  unreadable: {json.dumps(result.unreadable_images)}", style="yellow")
    console.print(f"[dim]{out / result.name}.json, adapter and predictions in {out / result.name}[/dim]")


def _plan(named: Named, given: dict[str, Any]) -> None:
    """Print what a step would cost; what a run would refuse is refused."""
    from hora_bench.dry_run import plan

    size = _image_size(named, given)
    asked = _request(named, given, task=named.name, scoring=_unread(named, given), steps=(1, 0))
    classes = named.family.members.get(named.member)
    if named.family.kind != "text" and not classes:
        classes = load_task(named.name, data=given["data"], model=asked.model, image_size=size).num_classes
    architecture = configs.read(given["config"]).get("architecture") if given["config"] else None
    plan(console, asked, architecture=architecture, num_classes=classes)


def _protocol(named: Named, given: dict[str, Any]) -> Any:
    changes = {"model": given["model"], "batch_size": given["batch_size"]}
    return replace(named.family.protocol, **{name: value for name, value in changes.items() if value is not None})


def _image_size(named: Named, given: dict[str, Any]) -> int | None:
    return given["image_size"] or named.family.protocol.image_size_px


def _ranked(given: dict[str, Any], rank: int) -> dict[str, Any]:
    """Options of the method, at the protocol's rank unless one is given; VeRA's rank is of another kind."""
    from hora_bench import methods

    method = methods.find(given["method"])
    ranked = "rank" in method.options and method.family != "vera"
    return {**({"rank": rank} if ranked else {}), **given["options"]}


def _seeds(seed: int | None, seeds: str | None) -> tuple[int, ...]:
    from hora_bench.request import seeds_of

    return (seed or 0,) if seeds is None else seeds_of(seeds)


def parse_mesh(given: str | None) -> dict[str, int] | None:
    """``fsdp=2,tp=4`` as axis sizes.

    Raises
    ------
    HoraError
        An axis is unknown or comes twice, or its size is no positive number.
    """
    if given is None:
        return None
    pairs = [part.partition("=") for part in given.split(",")]
    if any(name not in ("fsdp", "tp") or not size.isdecimal() or int(size) < 1 for name, _, size in pairs):
        raise HoraError(f"--mesh names the axes fsdp and tp with their sizes, got {given!r}: write fsdp=2,tp=4")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise HoraError(f"--mesh names each axis once, got {given!r}: write fsdp=2,tp=4")
    return {name: int(size) for name, _, size in pairs}


def _options(given: list[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for pair in given:
        key, equal, value = pair.partition("=")
        if not equal or key in changes:
            raise HoraError(f"--option takes key=value, each key once, got {pair!r}: see hora-bench methods")
        try:
            changes[key] = json.loads(value)
        except json.JSONDecodeError:
            changes[key] = value
    return changes


def _numbers(name: str, given: str | None) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in given.split(",")) if given else ()
    except ValueError as error:
        raise HoraError(f"{name} takes numbers, got {given!r}: write 1e-3,3e-3") from error
    if len(set(found)) < len(found):
        raise HoraError(f"{name} takes different numbers, got {given!r}: drop one")
    return found
