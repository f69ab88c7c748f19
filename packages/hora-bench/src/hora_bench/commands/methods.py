"""``hora-bench methods`` and ``hora-bench schema``."""

import json

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from hora_bench import store
from hora_bench.methods import METHODS, find

console = Console()


def command() -> None:
    """Fine-tuning methods, who implements them on each backend, and their options."""
    table = Table(
        Column("method", no_wrap=True), "what it trains", "torch", "jax", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for method in METHODS:
        table.add_row(method.name, method.description, *(method.library.get(b, "") for b in ("torch", "jax")))
    console.print(table)
    console.print("Options and what they are when left out: --option key=value, repeatable", style="bold")
    for method in METHODS:
        usual = find("hora").options if method.family == "hora" and method.name != "hora" else {}
        given = {key: value for key, value in method.options.items() if key not in usual or usual[key] != value}
        if given:
            options = ", ".join(f"{key}={json.dumps(value)}" for key, value in given.items())
            console.print(f"  {method.name}: {'as hora, but ' * bool(usual)}{options}", highlight=False)
    console.print(
        "Every method adapts Q and V of all attention layers and trains the classification head.", style="dim"
    )


def schema() -> None:
    """The JSON Schema of result files."""
    print(json.dumps(store.schema(), indent=2))
