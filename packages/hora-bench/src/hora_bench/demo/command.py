"""``hora-bench demo``."""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from hora_spec import HoraError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from hora_bench.store import check_writable
from hora_bench.terminal import show_table

console = Console()
REPORT: Final = "report.html"


def command(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller images and fewer steps: under a minute.")] = False,
    out: Annotated[Path, typer.Option(help="Where the report and the adapters go.")] = Path("results/demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON, nothing else.")] = False,
) -> None:
    """Fine-tune a pretrained ViT on both backends, merge, export, exchange, and write report.html."""
    console.quiet = as_json
    from hora_bench import assets
    from hora_bench.demo import page, stages

    started = time.perf_counter()
    size = stages.QUICK if quick else stages.FULL
    check_writable(out)
    for folder in (out / "adapter", out / "lora"):
        if folder.exists() and not (out / REPORT).exists():
            raise HoraError(
                f"a demonstration replaces what an earlier one wrote, got {folder} of something else: move it"
            )
    assets.find(stages.MODEL).get(report=lambda line: console.print(f"[dim]{line}[/dim]"))
    (out / REPORT).touch()  # of one that is cut off, too, what it wrote is known as a demonstration's
    for folder in ("adapter", "lora"):
        shutil.rmtree(out / folder, ignore_errors=True)
    task = stages.demo_task(size)

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        hora, hora_row = stages.train_torch("hora", task, size, _bar(progress, "HoRA on torch", size))
        in_jax, jax_row = stages.train_jax(task, size, _bar(progress, "HoRA on JAX", size))
        lora, lora_row = stages.train_torch("lora", task, size, _bar(progress, "LoRA of PEFT on torch", size))
        last = progress.add_task("merging, exporting, exchanging", total=3, loss="")
        hora_row.b_factors, lora_row.b_factors = stages.b_of(hora), stages.b_of(lora)
        exchange = stages.export_and_reload(hora, hora_row, task, size, out)
        progress.advance(last)
        stages.merge_torch(hora, hora_row, task, size)
        progress.advance(last)
        stages.merge_jax(in_jax, jax_row, task, size)
        progress.advance(last)

    rows = [hora_row, jax_row, lora_row]
    seconds = time.perf_counter() - started
    page.write(out / REPORT, rows, exchange, size, seconds)
    if as_json:
        print(json.dumps({"seconds": seconds, "rows": [_numbers(row) for row in rows], "exchange": exchange}))
        return
    show_table(console, "Fine-tuning", page.HEADER, page.table(rows))
    console.print(page.MEMORY_NOTE, style="dim")
    console.print(page.CAUTION, style="bold")
    show_table(console, "Merging and exchange", page.CHECKS, page.checks(rows, exchange))
    console.print(f"{seconds:.0f} s; {out / REPORT}, adapters in {out / 'adapter'} and {out / 'lora'}")


def _bar(progress: Progress, label: str, size: Any) -> Any:
    bar = progress.add_task(label, total=size.steps, loss="")
    return lambda done, total, loss: progress.update(bar, completed=done, total=total, loss=f"loss {loss:.3f}")


def _numbers(row: Any) -> dict[str, Any]:
    return {key: value for key, value in asdict(row).items() if key not in ("b_factors", "curve", "outputs")} | {
        "loss": row.curve.loss
    }
