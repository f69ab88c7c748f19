"""``hora-bench run``."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from hora_spec import HoraError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hora_bench import configs
from hora_bench.protocols import PROTOCOLS

console = Console()
TASKS = ", ".join(PROTOCOLS)
OWN_DATA = {
    "fgvc": "CUB/train.json, CUB/val.json, CUB/test.json (VPT's splits) and CUB/images, the same for the others",
    "image-folder": "train800.txt, val200.txt and test.txt with a path and a label per line, and the images",
    "records": "one JSON record a line: instruction, input, output, answer",
}


def _configure(context: typer.Context, name: str | None) -> str | None:
    """Options of a configuration become defaults, so that the command line still wins."""
    if name is not None:
        context.default_map = {**(context.default_map or {}), **configs.read(name)["options"]}
    return name


def command(
    task: Annotated[str, typer.Argument(help=f"One of {TASKS}; vtab/NAME and fgvc/NAME for one of a suite.")],
    data: Annotated[
        Path | None, typer.Argument(help="Folder, archive or file of vtab, fgvc, image-folder and records.")
    ] = None,
    *,
    backend: Annotated[Literal["torch", "jax"], typer.Option(help="Framework.")] = "torch",
    model: Annotated[
        str | None, typer.Option(help="Asset, directory, timm name or hub name; default the protocol's.")
    ] = None,
    method: Annotated[str, typer.Option(help="See hora-bench methods.")] = "hora",
    option: Annotated[list[str] | None, typer.Option(help="Option of the method, key=value; repeatable.")] = None,
    fraction: Annotated[float, typer.Option(min=0.0, max=1.0, help="Stratified part of the training data.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of initial values, data order and subset.")] = 0,
    tune: Annotated[bool, typer.Option("--tune", help="Choose rate and decay on validation; then test once.")] = False,
    tune_lr: Annotated[str | None, typer.Option(help="Learning rates of the search, comma-separated.")] = None,
    tune_wd: Annotated[str | None, typer.Option(help="Weight decays of the search, comma-separated.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    wd: Annotated[float | None, typer.Option(help="Weight decay.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the full training set.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples in a step.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many records to train on and to test.")] = None,
    scoring: Annotated[
        Literal["log-likelihood", "generation"], typer.Option(help="How answers of language models are judged.")
    ] = "log-likelihood",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the frozen weights.")] = "float32",
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
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, nothing else.")] = False,
) -> None:
    """Fine-tune a model on a task with a method, and score it; a killed run goes on where it was."""
    settings = dict(locals())
    others = os.environ.get("RANK", "0") != "0"  # under accelerate launch one process speaks
    console.quiet = as_json or others
    settings["as_json"] = as_json and not others
    names = _members(task)
    for name in names:
        _one(name, {**settings, "task": name})
    if len(names) > 1:
        console.print(f"{len(names)} tasks done: hora-bench show {out}")
    if backend == "torch" and not dry_run:
        from hora_bench.training.torch import exit_if_launched

        exit_if_launched()


def _members(task: str) -> list[str]:
    from hora_bench.tasks.image_sources import FGVC, VTAB

    suites = {"vtab": VTAB, "fgvc": FGVC}
    family, _, member = task.partition("/")
    if family not in PROTOCOLS:
        raise HoraError(f"a task is one of {TASKS}, got {task!r}: see hora-bench run --help")
    return [f"{family}/{name}" for name in suites[family]] if family in suites and not member else [task]


def _one(name: str, s: dict[str, Any]) -> None:
    from hora_bench import methods, runs
    from hora_bench.results import Request

    protocol = PROTOCOLS[name.partition("/")[0]]
    model = s["model"] or protocol.model
    options = _options(s["option"] or [])
    method = methods.find(s["method"])
    if "rank" in method.options and method.family != "vera":
        options = {"rank": protocol.rank, **options}
    method = method.configured(options)
    size = s["image_size"] or protocol.image_size_px
    if s["dry_run"]:
        _plan(name, s, model, method, protocol, size)
        return
    task = load_task(name, s["data"], model, image_size=size, limit=s["limit"])
    if s["batch_size"]:
        protocol = _replaced(protocol, batch_size=s["batch_size"])
    steps, warmup = protocol.steps(task.size("train+val"), s["epochs"])
    request = Request(
        task=task.name,
        model=model,
        method=method.name,
        options=method.options,
        backend=s["backend"],
        seed=s["seed"],
        fraction=s["fraction"],
        limit=s["limit"],
        image_size_px=size,
        learning_rate=protocol.learning_rate if s["lr"] is None else s["lr"],
        weight_decay=protocol.weight_decay if s["wd"] is None else s["wd"],
        batch_size=protocol.batch_size,
        steps=steps,
        warmup_steps=warmup,
        train_on="train+val",
        score_on="test",
        scoring="accuracy" if task.kind == "images" else s["scoring"],
        dtype=s["dtype"],
        mesh=parse_mesh(s["mesh"]),
        remat=s["remat"],
        scan=s["scan"],
        examples_sha256=task.fingerprint(),
    )
    _check(request)
    command_line = shlex.join(["hora-bench", *sys.argv[1:]])
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

        trials = None
        if s["tune"]:
            rates = _numbers("--tune-lr", s["tune_lr"]) or protocol.tune_learning_rates
            decays = _numbers("--tune-wd", s["tune_wd"]) or protocol.tune_weight_decays
            request, trials = runs.tune(
                request,
                task,
                s["out"],
                learning_rates=rates,
                weight_decays=decays,
                command=command_line,
                progress=report,
            )
        result = runs.run(request, task, s["out"], command=command_line, trials=trials, progress=report)
    if s["as_json"]:
        print(result.model_dump_json())
        return
    scores, measured = result.scores, result.measured
    console.print(
        f"[bold]{task.name}[/bold] {request.method} on {request.backend}: {scores.accuracy_pct:.2f} % "
        f"({scores.correct_count} of {scores.total_count}), {result.trained_params_count:,} trained parameters, "
        f"final loss {result.loss[-1]:.4f}, {1000 * measured.step_time_s:.0f} ms a step, lr {request.learning_rate:g}"
    )
    for group, accuracy in scores.groups_pct.items():
        console.print(f"  {group}: {accuracy:.1f} %")
    if result.unreadable_images:
        console.print(f"  unreadable: {json.dumps(result.unreadable_images)}", style="yellow")
    console.print(f"[dim]{s['out'] / request.name}.json[/dim]")


def _check(request: Any) -> None:
    """Refuse options that would change nothing."""
    if request.backend == "torch" and (request.mesh or request.remat or request.scan):
        raise HoraError("--mesh, --remat and --scan are JAX's, got --backend torch: use accelerate launch, or pass jax")
    if request.image_size_px and request.dtype != "float32":
        raise HoraError(f"image models are trained in float32, got --dtype {request.dtype}: leave it out")


def _plan(name: str, s: dict[str, Any], model: str, method: Any, protocol: Any, image_size: int | None) -> None:
    from hora_bench.dry_run.command import Setting, plan
    from hora_bench.tasks.image_sources import FGVC, VTAB

    classes = {**VTAB, **FGVC}.get(name.partition("/")[2])
    if image_size and not classes:
        classes = load_task(name, s["data"], model, image_size=image_size).num_classes
    setting = Setting(
        model=model,
        architecture=configs.read(s["config"]).get("architecture") if s["config"] else None,
        backend=s["backend"],
        method=method,
        batch_size=s["batch_size"] or protocol.batch_size,
        dtype=s["dtype"],
        mesh=parse_mesh(s["mesh"]) or {},
        image_size=image_size,
        num_classes=classes,
    )
    plan(setting, console)


def load_task(
    name: str, data: Path | None, model: str, *, image_size: int | None = None, limit: int | None = None
) -> Any:
    """The task of that name, with the model's tokenizer where it needs one."""
    from hora_bench import assets
    from hora_bench.models import load
    from hora_bench.tasks import image_sources, text

    family, _, member = name.partition("/")
    if family in OWN_DATA and data is None:
        raise HoraError(
            f"{family} reads your own copy of the data, got no path: "
            f"hora-bench run {name} DATA, where DATA holds {OWN_DATA[family]}"
        )
    path, size = data or Path(), image_size or 224
    match family:
        case "digits":
            return image_sources.digits(size)
        case "fashion-mnist":
            return image_sources.fashion_mnist(size)
        case "image-folder":
            return image_sources.image_folder(path, size)
        case "vtab":
            return image_sources.vtab(member, data or assets.find("vtab-1k").get(), size)
        case "fgvc":
            return image_sources.fgvc(member, path, size)
        case "commonsense":
            return text.commonsense(load.tokenizer(model), limit=limit, folder=data)
        case "records":
            return text.records_file(path, load.tokenizer(model), limit=limit)
    raise HoraError(f"a task is one of {TASKS}, got {name!r}")


def parse_mesh(given: str | None) -> dict[str, int] | None:
    """``fsdp=2,tp=4`` as axis sizes.

    Raises
    ------
    HoraError
        An axis is unknown or its size is no positive number.
    """
    if given is None:
        return None
    pairs = [part.partition("=") for part in given.split(",")]
    if any(name not in ("fsdp", "tp") or not size.isdigit() or int(size) < 1 for name, _, size in pairs):
        raise HoraError(f"--mesh names the axes fsdp and tp with their sizes, got {given!r}: write fsdp=2,tp=4")
    return {name: int(size) for name, _, size in pairs}


def _options(given: list[str]) -> dict[str, Any]:
    changes = {}
    for pair in given:
        key, equal, value = pair.partition("=")
        if not equal:
            raise HoraError(f"--option takes key=value, got {pair!r}: see hora-bench methods")
        try:
            changes[key] = json.loads(value)
        except json.JSONDecodeError:
            changes[key] = value
    return changes


def _numbers(name: str, given: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in given.split(",")) if given else ()
    except ValueError as error:
        raise HoraError(f"{name} takes numbers, got {given!r}: write 1e-3,3e-3") from error


def _replaced(protocol: Any, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(protocol, **changes)
