"""The experiments' page: Markdown and plots rebuilt from result files alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from hora_bench.experiments.record import read_record

Content = dict[str, Any]
TITLES: Final = {
    "cost": "Cost",
    "theory": "Theory",
    "similarity": "Similarity of heads",
    "ablate": "Ablation",
    "sample-efficiency": "Sample efficiency",
    "speed": "Speed",
}
LEAD: Final = (
    "Measured with `hora-bench`. Every section names its result file and the command it comes from; every number "
    "on this page is in one of the files."
)


def write_page(results: Path, out: Path) -> list[Path]:
    """Write a page and its plots from every result file below a folder.

    Parameters
    ----------
    results
        Searched for files of `hora_bench.experiments.record`; others are left alone.
    out
        The page; plots go into a folder of its name beside it.

    Returns
    -------
    list of Path
        What was written: the same bytes whenever the result files are the same.
    """
    plots = out.with_suffix("")
    plots.mkdir(parents=True, exist_ok=True)
    found = [(path, read_record(path)) for path in sorted(results.rglob("*.json")) if "runs" not in path.parts]
    records = [(path, content) for path, content in found if content.get("experiment") in TITLES]
    lines = [
        "# Benchmarks",
        "",
        LEAD,
        "",
        *_verdicts([content for _, content in records]),
    ]
    written = []
    for name in TITLES:
        for path, content in records:
            if content["experiment"] != name:
                continue
            drawn = _plots(name, content["result"], plots, path.stem)
            written += drawn
            lines += ["", f"## {TITLES[name]}", "", _source(path.relative_to(results), content), ""]
            lines += SECTIONS[name](content["result"])
            lines += [line for plot in drawn for line in ("", f"![{plot.stem}]({plots.name}/{plot.name})")]
            lines += [
                "",
                *(f"- {note}" for note in content["result"].get("notes", content["result"].get("limits", []))),
            ]
    out.write_text("\n".join(lines) + "\n")
    return [out, *written]


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in rows]


def _source(path: Path, content: Content) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    machine = content["machine"]["architecture"]
    return f"`{content['command']}`, `{path}`, {content['time_s']:g} s on {machine} ({versions})"


def _verdicts(contents: list[Content]) -> list[str]:
    """The paper's claims, each confirmed, not seen, or not testable with what ran here."""
    by_name = {content["experiment"]: content["result"] for content in reversed(contents)}
    rows = [
        (
            "VTAB-1K +2.2, FGVC +5.2 over LoRA",
            "cannot be tested here",
            "the data sets and their backbone are not at hand",
        ),
        ("commonsense reasoning +1.7 and +2.6", "cannot be tested here", "LLaMA-7B and 13B need GPUs"),
    ]
    if "cost" in by_name:
        share = by_name["cost"]["paper"][-1]["params_pct"]
        rows += [
            ("0.09 % of LLaMA-7B is trained", "confirmed", f"{share} % with `AdapterSpec.paper(32)`"),
            (
                "about 6 times LoRA's FLOPs",
                "confirmed as an account, not as a need",
                "one token and a dense delta; by branch the difference to LoRA is the factors, once a pass",
            ),
        ]
    if "theory" in by_name and by_name["theory"]["gates"]:
        passed = all(gate["passed"] for gate in by_name["theory"]["gates"])
        rows.append(
            (
                "polynomial instead of exponential sample complexity",
                "confirmed" if passed else "not seen",
                "for the recovery of updates with a redundant head, in a regression; not for prediction",
            )
        )
    if "similarity" in by_name:
        accuracy = {trial["method"]: trial["accuracy_pct"] for trial in by_name["similarity"]["trials"]}
        if {"hora", "lora"} <= accuracy.keys():
            ahead = accuracy["hora"] > accuracy["lora"]
            rows.append(
                (
                    "better than LoRA at equal training",
                    "seen, one task and seed" if ahead else "not seen",
                    f"{accuracy['hora']:.1f} against {accuracy['lora']:.1f} % on one small task, rates not tuned",
                )
            )
    if "sample-efficiency" not in by_name:
        rows.append(("over 20 % better at 1 % of the data", "not tested yet", "`hora-bench sample-efficiency`"))
    return ["## The paper's claims", "", *table(("claim", "verdict", "why"), rows)]


def _cost(result: Content) -> list[str]:
    from hora_bench.experiments.cost.command import readable

    lines = table(
        ("LLaMA-7B, one token, rank 32", "MACs", "paper"),
        [
            (step["step"], readable(step["macs"]), readable(step["paper_macs"]))
            for step in result["paper"]
            if "macs" in step
        ],
    )
    for model in result["models"]:
        own = [record for record in result["macs"] if record["model"] == model["model"] and record["route"] == "branch"]
        tokens = list(dict.fromkeys(record["tokens"] for record in own))
        rows = []
        for params in result["params"]:
            if params["model"] == model["model"]:
                shares = [f"+{r['added_train_pct']:.3g} %" for r in own if r["method"] == params["method"]]
                rows.append((params["method"], f"{params['params_count']:,}", f"{params['params_pct']:.3g} %", *shares))
        lines += [
            "",
            f"{model['model']}, rank {model['rank']}; MACs a training step adds by branch, at so many tokens:",
            "",
        ]
        lines += table(("method", "parameters", "of the model", *map(str, tokens)), rows)
    return lines


def _theory(result: Content) -> list[str]:
    rows = [
        (
            gate["gate"],
            f"{gate['value']:+.3f}",
            f"{gate['low']:+.2f} to {gate['high']:+.2f}",
            "passed" if gate["passed"] else "failed",
        )
        for gate in result["gates"]
    ]
    identified = [
        (
            found["sharing"],
            "invisible" if found["split_order"] is None else f"order {found['split_order']:.2f}",
            f"{found['value_error']:.1e}",
            "yes" if found["identified"] else "no",
        )
        for found in result["identify"]
    ]
    return [
        *table(("gate", "value", "bounds", ""), rows),
        "",
        *table(
            ("sharing", "a split of the value update", "largest error of noise-free fits", "identified"), identified
        ),
    ]


def _columns(*names: str, of: str) -> Callable[[Content], list[str]]:
    """A section that is one table of a result."""

    def section(result: Content) -> list[str]:
        cells = [[_cell(record.get(name)) for name in names] for record in result[of]]
        return table(names, cells)

    return section


def _cell(value: Any) -> Any:
    if isinstance(value, dict):
        return f"{value['ratio']} ({value['low']} to {value['high']})"
    return value


def _similarity(result: Content) -> list[str]:
    names = ("method", "projection", "mean_cosine_b", "mean_cosine_delta", "participation_ratio")
    return [
        *_columns("method", "seed", "accuracy_pct", "loss", "params_count", of="trials")(result),
        "",
        *_columns(*names, of="summary")(result),
        "",
        *_columns("parametrisation", "participation_ratio", "mean_cosine_of_columns", of="start")(result),
    ]


def _speed(result: Content) -> list[str]:
    steps = ("backend", "method", "median_s", "over_lora", "over_frozen", "kept_over_lora", "first_step_s")
    return [
        *_columns(*steps, of="steps")(result),
        "",
        *_columns("backend", "method", "form", "median_s", "over_frozen", of="inference")(result),
        "",
        *_columns("backend", "method", "operation", "median_s", of="operations")(result),
    ]


SECTIONS: Final[dict[str, Callable[[Content], list[str]]]] = {
    "cost": _cost,
    "theory": _theory,
    "similarity": _similarity,
    "ablate": _columns(
        "factor", "value", "mean_pct", "low_pct", "high_pct", "difference_pct", "params_count", of="rows"
    ),
    "sample-efficiency": _columns("method", "fraction", "learning_rate", "mean_pct", "low_pct", "high_pct", of="curve"),
    "speed": _speed,
}


def _plots(name: str, result: Content, folder: Path, stem: str) -> list[Path]:
    """The plots of an experiment, drawn from its result."""
    if name == "theory":
        from hora_bench.experiments.theory.plot import plot as plot_theory

        plot_theory(result, folder / f"{stem}.svg")
        return [folder / f"{stem}.svg"]
    if name == "sample-efficiency":
        from hora_bench.experiments.sample_efficiency import plot as plot_curve

        plot_curve(result, folder / f"{stem}.svg")
        return [folder / f"{stem}.svg"]
    if name == "similarity":
        from hora_bench.experiments.similarity.plot import plot as plot_similarity

        return plot_similarity(result, folder, stem=stem)
    return []
