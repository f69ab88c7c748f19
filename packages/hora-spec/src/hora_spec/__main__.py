"""The command ``hora``, also ``python -m hora_spec``: look into adapters, and make of them what servers load."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence

import numpy as np

from hora_spec import reference
from hora_spec.adapter import Adapter, AdapterLayer
from hora_spec.errors import HoraError
from hora_spec.files import load_adapter
from hora_spec.gguf_adapter import export_gguf
from hora_spec.lora import portable, to_lora
from hora_spec.lora_files import export_lora
from hora_spec.merged import save_merged
from hora_spec.servers import SERVERS, vllm_rank
from hora_spec.shapes import count_params
from hora_spec.verification import verify_export

_HEAD = ("layer", "rank", "params", "projection", "module", "layout", "heads", "head_dim", "embed", "|delta|")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it worked, 2 and one line on stderr if the input is bad."""
    options = _parser().parse_args(argv)
    try:
        said = options.run(options)
        try:
            print(said, flush=True)
        except BrokenPipeError:  # who reads, such as head, has seen enough; the rest goes nowhere, at exit too
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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


def _export_lora(options: argparse.Namespace) -> str:
    adapter = load_adapter(options.directory)
    choices = {"dtype": options.dtype, "compact": options.compact, "for_server": options.for_server}
    export_lora(adapter, options.out, **choices)
    modules = to_lora(adapter) if options.compact else portable(to_lora(adapter))
    ranks = sorted({module.rank for module in modules.values()})
    limit = vllm_rank(ranks[-1])
    hint = f" (vLLM: --max-lora-rank {limit})" if options.for_server == "vllm" else ""
    return f"{options.out}: LoRA adapter of rank {', '.join(map(str, ranks))}{hint}"


def _export_gguf(options: argparse.Namespace) -> str:
    adapter = load_adapter(options.directory)
    names = export_gguf(adapter, options.out, base=options.base, weights=options.weights, dtype=options.dtype)
    return f"{options.out}: GGUF adapter of {len(names)} tensors, {names[0]} to {names[-1]}"


def _merge(options: argparse.Namespace) -> str:
    adapter = load_adapter(options.directory)
    names = save_merged(adapter, options.base, options.out, progress=_Progress())
    return f"{options.out}: merged model, {len(names)} tensors changed, {names[0]} to {names[-1]}"


def _verify(options: argparse.Namespace) -> str:
    adapter = load_adapter(options.directory)
    whole = f"{options.directory}: whole, {len(adapter.layers)} layers"
    if options.export is None:
        return whole
    distances = verify_export(adapter, options.export, base=options.base)
    return f"{whole}\n{options.export}: the same updates, {len(distances)} weights within {max(distances.values()):.1e}"


class _Progress:
    """Percent on stderr, where a person looks on."""

    def __init__(self) -> None:
        self.shown = -1

    def __call__(self, done: int, total: int) -> None:
        percent = 100 * done // max(1, total)
        if sys.stderr.isatty() and percent > self.shown:
            self.shown = percent
            print(f"\r{percent:3d} % of {total / 1e9:.1f} GB", end="\n" if done == total else "", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hora", description="Tools for HoRA adapters on disk. They need no framework."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], str], text: str) -> argparse.ArgumentParser:
        result = commands.add_parser(name, help=text, description=text)
        result.add_argument("directory", metavar="ADAPTER", help="adapter directory")
        result.set_defaults(run=run)
        return result

    command("inspect", _inspect, "print layers, shapes, parameters and the norm of each delta")
    lora = command("export-lora", _export_lora, "write a standard PEFT LoRA adapter that computes the same")
    lora.add_argument("out", metavar="OUT", help="new or empty directory")
    lora.add_argument("--for-server", choices=SERVERS, help="refuse what this server rejects or misreads")
    lora.add_argument("--compact", action="store_true", help="a rank and alpha for each module, by patterns")
    lora.add_argument("--dtype", choices=("float16", "float32", "float64"), default="float32")
    gguf = command("export-gguf", _export_gguf, "write a GGUF adapter for llama.cpp")
    gguf.add_argument("out", metavar="OUT.gguf", help="new file")
    gguf.add_argument("--base", required=True, metavar="MODEL.gguf", help="GGUF file to which it will be applied")
    gguf.add_argument(
        "--weights", metavar="BASE", help="directory of the base as trained on: prove that MODEL.gguf is it"
    )
    gguf.add_argument("--dtype", choices=("float16", "float32"), default="float32")
    merge = command("merge", _merge, "write a model with the adapter merged into it")
    merge.add_argument("base", metavar="BASE", help="directory of the base, with safetensors")
    merge.add_argument("out", metavar="OUT", help="new or empty directory")
    verify = command("verify", _verify, "check an adapter, and what was made from it")
    verify.add_argument("export", metavar="EXPORT", nargs="?", help="LoRA directory, GGUF adapter or merged model")
    verify.add_argument("--base", metavar="BASE", help="directory of the base, for a merged model")
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
