"""``python -m hora_spec``: look into an adapter directory, or export it as LoRA."""

import argparse
import math
import sys
from collections.abc import Sequence

import numpy as np

from hora_spec import reference
from hora_spec.adapter import Adapter, AdapterLayer
from hora_spec.errors import HoraError
from hora_spec.files import load_adapter
from hora_spec.lora import to_lora
from hora_spec.lora_files import export_lora
from hora_spec.shapes import count_params

_HEAD = ("layer", "rank", "params", "projection", "module", "layout", "heads", "head_dim", "embed", "|delta|")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it worked, 2 and one line on stderr if the input is bad."""
    options = _parser().parse_args(argv)
    try:
        print(options.run(options))
    except (HoraError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def inspect(adapter: Adapter) -> str:
    """Plain-text table of an adapter: layers, shapes, parameters and the Frobenius norm of each delta.

    Parameters
    ----------
    adapter
        A valid adapter.

    Returns
    -------
    str
        The method first, then one line per projection, then totals.
    """
    rows = [row for name, layer in adapter.layers.items() for row in _rows(name, layer)]
    params = sum(count_params(layer.spec, layer.shape) for layer in adapter.layers.values())
    whole = sum(array.size for array in adapter.modules.values())
    norm = math.hypot(*(norm for layer in adapter.layers.values() for norm in delta_norms(layer).values()))
    return "\n".join(
        [
            *_methods(adapter),
            "",
            *_table([_HEAD, *rows]),
            "",
            f"{len(adapter.layers)} layers, {len(rows)} projections, {params:,} HoRA parameters, |delta| {norm:.4g}",
            *([f"{len(adapter.modules)} tensors of modules trained whole, {whole:,} values"] if whole else []),
        ]
    )


def delta_norms(layer: AdapterLayer) -> dict[str, float]:
    """``|scaling * stack_i(B_i A_i)|`` (Frobenius) of every projection, without the dense product."""
    norms = {}
    for p, (a, b) in reference.factors(layer.spec, layer.shape, layer.params).items():
        a_of = np.broadcast_to(a, (len(b), *a.shape[-2:]))
        square = sum(np.sum((b_i.T @ b_i) * (a_i @ a_i.T)) for a_i, b_i in zip(a_of, b, strict=True))
        norms[p] = layer.spec.scaling * math.sqrt(max(0.0, float(square)))
    return norms


def _inspect(options: argparse.Namespace) -> str:
    return inspect(load_adapter(options.directory))


def _export(options: argparse.Namespace) -> str:
    adapter = load_adapter(options.directory)
    export_lora(adapter, options.out)
    ranks = sorted({module.rank for module in to_lora(adapter).values()})
    return f"{options.out}: LoRA adapter of rank {', '.join(map(str, ranks))}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hora_spec", description="Tools for HoRA adapters on disk.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("inspect", help="print layers, shapes, parameters and the norm of each delta")
    command.add_argument("directory", metavar="DIR", help="adapter directory")
    command.set_defaults(run=_inspect)
    command = commands.add_parser("export-lora", help="write the adapter as a standard PEFT LoRA adapter, exactly")
    command.add_argument("directory", metavar="DIR", help="adapter directory")
    command.add_argument("out", metavar="OUT", help="new or empty directory")
    command.set_defaults(run=_export)
    return parser


def _methods(adapter: Adapter) -> list[str]:
    """One line per method that occurs, the rank left to the table."""
    base = adapter.config.get("base_model_name_or_path")
    specs = dict.fromkeys(layer.spec for layer in adapter.layers.values())
    return [
        *([f"base model {base}"] if base else []),
        *("HoRA " + ", ".join(f"{key} {value}" for key, value in spec.to_dict().items()) for spec in specs),
    ]


def _rows(name: str, layer: AdapterLayer) -> list[tuple[str, ...]]:
    norms = delta_norms(layer)
    rows = []
    for i, (p, site) in enumerate(layer.sites.items()):
        span, shape = site.layout.span(site.weight_shape), site.projection
        layout = site.layout.pattern + ("" if span is None else f" [{span}]")
        first = (name, str(layer.spec.rank), f"{count_params(layer.spec, layer.shape):,}") if i == 0 else ("", "", "")
        sizes = (str(shape.num_heads), str(shape.head_dim), str(shape.embed_dim))
        rows.append((*first, p, site.module, layout, *sizes, f"{norms[p]:.4g}"))
    return rows


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    number = [title in ("rank", "params", "heads", "head_dim", "embed", "|delta|") for title in rows[0]]
    return [
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, number, strict=True)).rstrip()
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
