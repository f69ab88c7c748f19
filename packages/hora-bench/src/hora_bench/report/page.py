"""The pages of benchmarks, Markdown or HTML, rebuilt from result files alone: a summary, and a page per question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from hora_spec import HoraError

from hora_bench import store
from hora_bench.cache import new_file, read_json
from hora_bench.report import labels
from hora_bench.report.answers import answers
from hora_bench.report.comparisons import forest, found_in
from hora_bench.report.pieces import OVER_TASKS, never_worse, pieces_of, section
from hora_bench.report.rows import COMPARISONS, of_wrong_labels
from hora_bench.report.tables import notes, plots, tables
from hora_bench.report.verdicts import Verdict, verdicts
from hora_bench.report.writing import embedded, folded, link, save, table, write_html

Records = Sequence[tuple[Path, dict[str, Any]]]
Plots = dict[Path | None, list[Path]]  # of a result file
Address = Callable[[Path], str]  # of a plot, on the page
QUESTIONS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {  # page: its title, experiments
    "comparisons": ("Is it more accurate?", COMPARISONS),
    "cost": ("What does it cost, counted?", ("cost",)),
    "speed": ("What does it cost, measured?", ("speed", "screen-cost")),
    "similarity": ("How alike are the heads?", ("similarity",)),
    "signal": ("What do heads have in common?", ("signal",)),
    "rates": ("How wide is the range of rates?", ("rates",)),
    "robustness": ("Is it robust?", ("robustness",)),
    "theory": ("Does the theory show?", ("theory", "theory-activations")),
}
EXPERIMENTS: Final = tuple(name for _, names in QUESTIONS.values() for name in names)
LEAD: Final = (
    "Measured with `hora-bench`. Every number is in a result file that is linked beside it, with the command that "
    "makes it again. *Not seen* means that the whole interval is below what is claimed; *not resolved*, that it holds "
    "both, or that a rate is at the edge of its grid. What could have been seen is the true difference that so many "
    "seeds would have shown in four of five such experiments."
)
PROXIES: Final = (
    "The last blocks alone, on cached outputs of the frozen ones: proxies, by which no claim is judged. Each choice at "
    f"a rate of its own. {OVER_TASKS}"
)
WHOLE: Final = f"All blocks, each choice at a rate of its own. {OVER_TASKS}"
DIFFERENCES: Final = "differences"


def write_page(results: Path, out: Path) -> list[Path]:
    """Write the pages from every result file below a folder.

    Parameters
    ----------
    results
        Searched for files of experiments and of runs; others are left alone.
    out
        ``.md``, the summary, with plots and a page per question in a folder of its name beside it, or ``.html``, one
        file that holds everything.

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
    contents = [(path, read_json(path)) for path in sorted(results.rglob("*.json"))]
    records = [(path, c) for path, c in contents if isinstance(c, dict) and c.get("experiment") in EXPERIMENTS]
    runs = [store.read(path) for path, _ in contents if store.is_result(path)]
    if not (records or runs):
        raise HoraError(f"{results} must hold results of experiments, got none: run one, such as hora-bench theory")
    if out.suffix == ".html":
        with TemporaryDirectory() as folder:
            drawn = _draw(records, Path(folder))
            embeddings = {path: embedded(path) for paths in drawn.values() for path in paths}
        texts = [_summary(records, runs, out, drawn, embeddings.__getitem__)]
        texts += [_question(name, records, out, drawn, embeddings.__getitem__) for name in QUESTIONS]
        write_html(out, "Benchmarks", texts)
        return [out]
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = _draw(records, folder)
    pages = {out: _summary(records, runs, out, drawn, lambda path: f"{folder.name}/{path.name}")}
    for name in QUESTIONS:
        page = folder / f"{name}.md"
        pages[page] = _question(name, records, page, drawn, lambda path: path.name)
    for page, text in pages.items():
        with new_file(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [*pages, *chain.from_iterable(drawn.values())]


def _draw(records: Records, folder: Path) -> Plots:
    """The plots of each result file, and under None the one of all comparisons."""
    drawn: Plots = {path: plots(c["experiment"], c["result"], folder, path.stem) for path, c in records}
    compared = [one for _, c in records if c["experiment"] in COMPARISONS for one in found_in(c["result"])]
    return drawn | {None: [save(forest(compared), folder / f"{DIFFERENCES}.svg")] if compared else []}


def _summary(records: Records, runs: Sequence[store.RunResult], page: Path, drawn: Plots, address: Address) -> str:
    """Claims with verdicts, the differences at a glance, and where the pages and files are."""
    found = verdicts(records, runs)
    lines = ["# Benchmarks", "", LEAD, "", *_answers(records, found, page), "## The paper's claims"]
    said = [(*verdict[:3], verdict.file and link(verdict.file, page)) for verdict in found]
    lines += table(("claim", "verdict", "why", "result"), said)
    for path in drawn[None]:
        lines += ["## Differences from LoRA", "", f"![{DIFFERENCES}]({address(path)})", ""]
    lines += _task_by_task("Whole models, task by task", WHOLE, records, page, proxy=False)
    lines += _task_by_task("Screens", PROXIES, records, page, proxy=True)
    if page.suffix == ".md":
        lines += ["## Questions", ""]
        lines += [f"- [{title}]({page.stem}/{name}.md)" for name, (title, _) in QUESTIONS.items()]
    lines += ["", "## What was measured where"]
    letters: dict[str, str] = {}  # of sets of versions, each of which is written once
    where = []
    for path, content in records:
        letter = letters.setdefault(_versions(content), chr(ord("A") + len(letters)))
        seconds = f"{content['time_s']:g} s"
        where.append((link(path, page), f"`{content['command']}`", seconds, _machine(content), letter))
    lines += table(("result", "command", "time, resumed work left out", "machine", "versions"), where)
    lines += [f"- {letter}: {versions}" for versions, letter in letters.items()]
    return _squeezed(lines)


def _answers(records: Records, found: Sequence[Verdict], page: Path) -> list[str]:
    """The questions with their answers, and where these stand."""
    rows = [
        (question, said, f"[details]({page.stem}/{name}.md)" if page.suffix == ".md" else "", _code(commands))
        for name, question, said, commands in answers(records, found)
    ]
    return ["## Questions and answers", *table(("question", "answer", "files", "made by"), rows)] if rows else []


def _code(commands: Sequence[str]) -> str:
    return ", ".join(f"`{command}`" for command in commands)


def _task_by_task(title: str, lead: str, records: Records, page: Path, *, proxy: bool) -> list[str]:
    """What comparisons found whose tasks are pieces, and which choice a user can take without a loss."""
    found = pieces_of(records, proxy=proxy)
    if not found:
        return []
    lines = [f"## {title}", "", lead, ""]
    for command, pieces in found.items():
        safe = ", ".join(never_worse(pieces)) or "none"
        lines += [*section(command, pieces, page), f"Better than LoRA on a task, and worse on none: {safe}.", ""]
    return lines


def _question(name: str, records: Records, page: Path, drawn: Plots, address: Address) -> str:
    """Every result that answers a question: its plots, its notes, its tables folded."""
    title, experiments = QUESTIONS[name]
    own = [(path, content) for path, content in records if page_of(content) == name]
    lines = [f"# {title}", "", *([] if own else [f"Not measured yet: see `hora-bench {experiments[0]}`."])]
    for path, content in own:
        lines += [f"## {path.stem}", "", f"{link(path, page)}: `{content['command']}`", ""]
        for plot in drawn[path]:
            lines += [f"![{plot.stem}]({address(plot)})", ""]
        for one in tables(content["experiment"], content["result"]):
            lines += folded(one.title, one.header, one.rows)
        lines += [*(f"- {note}" for note in notes(content["result"])), ""]
    lines += labels.section(records) if name == "robustness" else []
    return _squeezed(lines)


def page_of(content: dict[str, Any]) -> str:
    """The question that a result answers: comparisons after wrong labels are of robustness."""
    experiment = content["experiment"]
    if experiment in COMPARISONS and of_wrong_labels(content["result"]):
        return "robustness"
    return next(name for name, (_, experiments) in QUESTIONS.items() if experiment in experiments)


def _machine(content: dict[str, Any]) -> str:
    machine = content["machine"]
    cores = f", {machine['cores_count']} cores" if "cores_count" in machine else ""
    threads = f", OMP_NUM_THREADS={machine['omp_threads']}" if machine.get("omp_threads") else ""
    return f"{machine['system']} {machine['architecture']}{cores}{threads}"


def _versions(content: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in content["versions"].items())


def _squeezed(lines: Sequence[str]) -> str:
    """Lines as text, never two empty ones."""
    kept = [line for line, before in zip(lines, ["", *lines], strict=False) if line or before]
    return "\n".join(kept).rstrip("\n") + "\n"
