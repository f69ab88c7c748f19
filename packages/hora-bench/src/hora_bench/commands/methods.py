"""``hora-bench methods`` and ``hora-bench schema``."""

import json

from rich.console import Console
from rich.table import Column, Table

from hora_bench import results
from hora_bench.methods import METHODS, find

console = Console()


def command() -> None:
    """Fine-tuning methods, who implements them on each backend, and their options."""
    last = Column("options (--option key=value)", overflow="fold")
    table = Table(Column("method", no_wrap=True), "what it trains", "torch", "jax", last)
    for method in METHODS:
        usual = find("hora").options if method.family == "hora" and method.name != "hora" else {}
        given = {key: value for key, value in method.options.items() if key not in usual or usual[key] != value}
        options = ", ".join(f"{key}={value}" for key, value in given.items())
        table.add_row(method.name, method.description, *(method.library.get(b, "") for b in ("torch", "jax")), options)
    console.print(table)
    console.print(
        "Every method adapts Q and V of all attention layers and trains the classification head.", style="dim"
    )


def schema() -> None:
    """The JSON Schema of result files."""
    print(json.dumps(results.schema(), indent=2))
