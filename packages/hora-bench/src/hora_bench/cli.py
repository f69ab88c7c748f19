"""The command line: one command a file; frameworks are imported when a command works, not for help."""

import sys

import typer
from hora_spec import HoraError
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from hora_bench.commands import experiments, lists, run, show
from hora_bench.demo import command as demo
from hora_bench.request import first_error

TOUR = """
HoRA on real models and data, on torch and JAX.

Start with [bold]demo[/bold]: five minutes, everything once. Then [bold]run[/bold] fine-tunes a model on a benchmark
or on your own data with any of the [bold]methods[/bold], and [bold]show[/bold] tabulates what you ran. The experiments
of the paper have a command each. Weights and data are fetched once, see [bold]assets[/bold].
"""
START, WORK, PAPER = "Start here", "Fine-tune and compare", "The paper's experiments"

app = typer.Typer(help=TOUR, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)
app.command("demo", rich_help_panel=START)(demo.command)
app.add_typer(lists.app, name="assets", rich_help_panel=START)
app.command("run", rich_help_panel=WORK)(run.command)
app.command("show", rich_help_panel=WORK)(show.command)
app.command("methods", rich_help_panel=WORK)(lists.show_methods)
app.command("schema", rich_help_panel=WORK)(lists.schema)
app.command("cost", rich_help_panel=PAPER)(experiments.cost)
app.command("theory", rich_help_panel=PAPER)(experiments.theory)
app.command("sweep", rich_help_panel=PAPER)(experiments.sweep)
for former in ("ablate", "sample-efficiency"):  # what result files of earlier versions name
    app.command(former, hidden=True)(experiments.sweep)
app.command("similarity", rich_help_panel=PAPER)(experiments.similarity)
app.command("signal", rich_help_panel=PAPER)(experiments.signal)
app.command("rates", rich_help_panel=PAPER)(experiments.rates)
app.command("robustness", rich_help_panel=PAPER)(experiments.robustness)
app.command("speed", rich_help_panel=PAPER)(experiments.speed)
app.command("report", rich_help_panel=PAPER)(experiments.report)


def main() -> None:
    """Run the command line; an error of ours is one line, not a traceback."""
    try:
        app()
    except HoraError as error:
        message = str(error)
    except ValidationError as error:
        first = error.errors()[0]
        what, where = first_error(error)
        message = f"{where} of a run: {what}, got {first['input']!r}: see hora-bench run --help"
        if first["type"] == "value_error":
            message = str(first["ctx"]["error"])
    else:
        return
    Console(stderr=True).print("[red]error:[/red]", Text(message))
    sys.exit(2)
