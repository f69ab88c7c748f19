"""``hora-bench assets``."""

from typing import Annotated

import typer
from rich.console import Console
from rich.padding import Padding

from hora_bench import assets
from hora_bench.asset_table import ASSETS
from hora_bench.cache import cache_dir

app = typer.Typer(no_args_is_help=True, help="Weights and data: what there is, where it comes from, fetch it.")
console = Console()


@app.command("list")
def show() -> None:
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
