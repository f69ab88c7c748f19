"""``hora-bench cost``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hora_bench.report.tables import show
from hora_bench.store import check_writable, write_experiment

from .architectures import MODELS
from .run import cost

console = Console()


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
    check_writable(out.parent)
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
    write_experiment(out, "cost", f"hora-bench cost{flags}", seconds=time.perf_counter() - started, result=result)
    show(console, "cost", result, out)
