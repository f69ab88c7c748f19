"""The experiments' page, Markdown or HTML, rebuilt from result files alone."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from hora_spec import HoraError

from hora_bench.cache import new_file, read_json
from hora_bench.experiments.markdown import embedded, link, table
from hora_bench.experiments.sections import notes, plots, tables
from hora_bench.experiments.verdicts import verdicts
from hora_bench.report import write_document

Records = list[tuple[Path, dict[str, Any]]]
TITLES: Final = {
    "cost": "Cost",
    "theory": "Theory",
    "sample-efficiency": "Sample efficiency",
    "ablate": "Ablation",
    "similarity": "Similarity of heads",
    "speed": "Speed",
}
LEAD: Final = (
    "Measured with `hora-bench`. Every section links its result file and shows the command it comes from; every number "
    "on this page is in one of the files."
)


def write_page(results: Path, out: Path) -> list[Path]:
    """Write a page from every result file below a folder.

    Parameters
    ----------
    results
        Searched for files of `hora_bench.experiments.record`; others are left alone.
    out
        ``.md``, with plots in a folder of its name beside it, or ``.html``, one file that holds them.

    Returns
    -------
    list of Path
        What was written: the same bytes whenever the result files are the same.

    Raises
    ------
    HoraError
        The page is neither, or there are no results.
    """
    if out.suffix not in (".md", ".html"):
        raise HoraError(f"a page is Markdown (.md) or HTML (.html), got {out.name}: rename it")
    found = [(path, read_json(path)) for path in sorted(results.rglob("*.json")) if "runs" not in path.parts]
    records = [(path, c) for path, c in found if isinstance(c, dict) and c.get("experiment") in TITLES]
    if not records:
        raise HoraError(f"{results} must hold results of experiments, got none: run one, such as hora-bench theory")
    if out.suffix == ".md":
        folder = out.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        drawn = _draw(records, folder)
        images = {path: f"{folder.name}/{path.name}" for paths in drawn.values() for path in paths}
        with new_file(out) as temporary:
            temporary.write_text(_markdown(records, out, drawn, images), encoding="utf-8")
        return [out, *images]
    with TemporaryDirectory() as folder:
        drawn = _draw(records, Path(folder))
        images = {path: embedded(path) for paths in drawn.values() for path in paths}
    write_document(out, "Benchmarks", _html(_markdown(records, out, drawn, images)))
    return [out]


def _draw(records: Records, folder: Path) -> dict[Path, list[Path]]:
    """The plots of each result file."""
    return {path: plots(content["experiment"], content["result"], folder, path.stem) for path, content in records}


def _markdown(records: Records, out: Path, drawn: dict[Path, list[Path]], images: dict[Path, str]) -> str:
    """The page as Markdown, whose images are given by their addresses."""
    said = [(*verdict[:3], verdict.file and link(verdict.file, out)) for verdict in verdicts(records)]
    where = [
        (link(path, out), f"`{content['command']}`", f"{content['time_s']:g} s", _machine(content))
        for path, content in records
    ]
    lines = ["# Benchmarks", "", LEAD, "", "## The paper's claims"]
    lines += table(("claim", "verdict", "why", "result"), said)
    lines += ["## What was measured where", *table(("result", "command", "time", "machine"), where)]
    for name, title in TITLES.items():
        for path, content in records:
            if content["experiment"] == name:
                result = content["result"]
                lines += [f"## {title}", "", f"{link(path, out)}: `{content['command']}`"]
                for one in tables(name, result):
                    lines += ["", f"{one.title}:", *table(one.header, one.rows)]
                lines += [line for plot in drawn[path] for line in (f"![{plot.stem}]({images[plot]})", "")]
                lines += [*(f"- {note}" for note in notes(result)), ""]
    squeezed = [line for line, before in zip(lines, ["", *lines], strict=False) if line or before]
    return "\n".join(squeezed).rstrip("\n") + "\n"


def _machine(content: dict[str, Any]) -> str:
    machine = content["machine"]
    cores = f", {machine['cores_count']} cores" if "cores_count" in machine else ""
    threads = f", OMP_NUM_THREADS={machine['omp_threads']}" if machine.get("omp_threads") else ""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return f"{machine['system']} {machine['architecture']}{cores}{threads}; {versions}"


def _html(markdown: str) -> str:
    from markdown_it import MarkdownIt

    renderer = MarkdownIt("commonmark").enable("table")
    renderer.validateLink = lambda url: True  # plots are data of a kind that it does not expect
    return renderer.render(markdown)
