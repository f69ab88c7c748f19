"""``hora-bench cost``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from hora_bench.experiments.record import write_record

from .architectures import MODELS
from .run import cost

console = Console()
UNITS: Final = ("", " K", " M", " G", " T", " P")


def command(
    model: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(MODELS)}; all when left out.")] = None,
    *,
    rank: Annotated[int | None, typer.Option(min=1, help="Of every method; 8 for vision, 32 for language.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="By hand alone, without the frameworks' counters.")] = False,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("results/cost.json"),
) -> None:
    """Parameters and multiply-accumulates of every method on ViT and LLaMA, without weights."""
    if unknown := set(model or ()) - set(MODELS):
        raise typer.BadParameter(f"models are {', '.join(MODELS)}, got {', '.join(sorted(unknown))}")
    started = time.perf_counter()
    with console.status("counting") as status:
        result = cost(
            model or tuple(MODELS),
            rank=rank,
            torch=not quick,
            xla=not quick,
            progress=lambda name: status.update(f"counting {name}"),
        )
    flags = "".join([*(f" --model {m}" for m in model or ()), f" --rank {rank}" * bool(rank), " --quick" * quick])
    write_record(out, "cost", f"hora-bench cost{flags}", seconds=time.perf_counter() - started, result=result)
    show(result)
    console.print(f"[dim]{out}[/dim]")


def show(result: dict[str, Any]) -> None:
    """Print parameters, added MACs, the paper's figures and notes of a result."""
    for model in result["models"]:
        _show_model(model, result)
    table = Table("LLaMA-7B, one token, rank 32", "MACs", "paper", title="where 41.32 G against 6.63 G comes from")
    for step in result["paper"]:
        if "macs" in step:
            table.add_row(step["step"], readable(step["macs"]), readable(step["paper_macs"]))
        else:
            count = f"{step['params_count']:,} ({step['params_pct']} %)"
            table.add_row(step["step"], count, f"{step['paper_params_pct']} %")
    console.print(table)
    for note in result["notes"]:
        console.print(f"- {note}", highlight=False)


def _show_model(model: dict[str, Any], result: dict[str, Any]) -> None:
    """One table: a method and route per row; parameters, and what a training step costs more, per workload.

    The dense route is the paper's accounting and costs every variant the same: shown once.
    """
    records = [record for record in result["macs"] if record["model"] == model["model"]]
    params = {record["method"]: record for record in result["params"] if record["model"] == model["model"]}
    loads = sorted({record["tokens"] for record in records})
    table = Table(
        "method",
        "parameters",
        "route",
        *(f"{tokens} tokens" for tokens in loads),
        title=f"{model['model']}, rank {model['rank']}: MACs of a training step over the frozen model's",
    )
    for name, counted in params.items():
        own = [r for r in records if r["method"] == name and (r["route"] != "dense" or name == "hora-paper")]
        for index, route in enumerate(dict.fromkeys(record["route"] for record in own)):
            shares = [f"+{r['added_train_pct']:.3g} %" for r in own if r["route"] == route]
            size = f"{readable(counted['params_count'])} ({counted['params_pct']:.3g} %)"
            table.add_row(*(("", "") if index else (name, size)), route, *shares)
    console.print(table)


def readable(count: float | None) -> str:
    """A count with four digits and a unit, or nothing."""
    if count is None:
        return ""
    power = min(len(UNITS) - 1, (len(str(int(count))) - 1) // 3)
    return f"{count / 1000**power:.4g}{UNITS[power]}"
