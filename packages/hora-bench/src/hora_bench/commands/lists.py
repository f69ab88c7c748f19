"""``hora-bench methods``, ``schema`` and ``assets``: what there is."""

from __future__ import annotations

import json
from typing import Annotated, Final

import typer
from hora_spec import LayerShape, count_params
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table

from hora_bench import assets, store
from hora_bench.asset_table import ASSETS
from hora_bench.cache import cache_dir
from hora_bench.methods import METHODS, Method, find

DEPTH: Final = 12
LAYER: Final = LayerShape.attention(embed_dim=384, num_heads=6)

console = Console()


def show_methods() -> None:
    """Fine-tuning methods, who implements them on each backend, and their options."""
    whole = {name: Column(name, no_wrap=True) for name in ("method", "preset", "parameters")}
    names = "method", "what it trains", "preset", "parameters", "torch", "jax"
    table = Table(*(whole.get(name, name) for name in names), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for method in METHODS:
        libraries = (method.library.get(backend, "") for backend in ("torch", "jax"))
        table.add_row(method.name, method.description, method.preset, _count(method), *libraries)
    console.print(table)
    console.print(
        "Presets are those of hora_spec.PRESETS. Parameters: trained ones of Q and V in a ViT-S/14 (12 layers, 6 heads "
        "of 64) with the options below; those of peers are counted by hora-bench run --dry-run.",
        style="dim",
    )
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


def _count(method: Method) -> str:
    """Trained parameters of one of HoRA's methods."""
    if method.family != "hora":
        return ""
    return f"{DEPTH * count_params(method.spec, LAYER):,}"


def schema() -> None:
    """The JSON Schema of result files."""
    print(json.dumps(store.schema(), indent=2))


app = typer.Typer(no_args_is_help=True, help="Weights and data: what there is, where it comes from, fetch it.")


@app.command("list")
def show_assets() -> None:
    """All assets, their licences and sources, and which are in the cache."""
    console.print(f"cache: {cache_dir()}", highlight=False)
    for asset in ASSETS:
        origin = asset.origin
        state = f"in the cache, from {origin['source']}" if origin else "not in the cache"
        console.print(f"\n[bold]{asset.name}[/bold]: {state}", highlight=False)
        for line in (asset.description, f"licence: {asset.licence}", f"from: {', '.join(map(str, asset.sources))}"):
            console.print(Padding(line, (0, 0, 0, 2)), highlight=False)


@app.command("get")
def get(
    names: Annotated[list[str], typer.Argument(help="Which, by their names in the list.")],
) -> None:
    """Fetch, check and convert assets; what is already there is left alone."""
    for name in names:
        asset = assets.find(name)
        path = asset.get(report=lambda line: console.print(f"[dim]{line}[/dim]"))
        checks = ", ".join(f"{key} {value:g}" for key, value in (asset.origin or {})["checks"].items())
        console.print(f"{name}: {path}" + (f" ({checks})" if checks else ""))
