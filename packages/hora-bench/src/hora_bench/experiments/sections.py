"""Tables and plots of each experiment, from its result alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from hora_bench.experiments.markdown import records_table, table

Result = dict[str, Any]
WAYS: Final = ("forward", "backward")


def tables(experiment: str, result: Result) -> list[str]:
    """Lines of Markdown."""
    return TABLES[experiment](result)


def plots(experiment: str, result: Result, folder: Path, stem: str) -> list[Path]:
    """Draw the plots of an experiment into `folder`; their names begin with `stem`."""
    if experiment == "similarity":
        from hora_bench.experiments.similarity.plot import plot

        return plot(result, folder, stem=stem)
    path = folder / f"{stem}.svg"
    if experiment == "theory":
        from hora_bench.experiments.theory.plot import plot as plot_rates

        plot_rates(result, path)
    elif experiment == "sample-efficiency":
        from hora_bench.experiments.sample_efficiency import plot as plot_curve

        plot_curve(result, path)
    elif experiment == "ablate":
        from hora_bench.experiments.ablate import plot as plot_choices

        plot_choices(result, path)
    else:
        return []
    return [path]


def _cost(result: Result) -> list[str]:
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
        tokens = dict.fromkeys(record["tokens"] for record in own)
        rows = []
        for params in result["params"]:
            if params["model"] == model["model"]:
                shares = [f"+{r['added_train_pct']:.3g} %" for r in own if r["method"] == params["method"]]
                rows.append((params["method"], f"{params['params_count']:,}", f"{params['params_pct']:.3g} %", *shares))
        lines.append(f"{model['model']}, rank {model['rank']}; MACs a training step adds by branch, at so many tokens:")
        lines += table(("method", "parameters", "of the model", *map(str, tokens)), rows)
    return [*lines, *_agreement(result)]


def _agreement(result: Result) -> list[str]:
    """What the frameworks count over what is counted by hand, by branch: the range over models and tokens."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for of, prefix, by_hand in (("macs", "torch_added_", "added_"), ("xla", "xla_", "")):
        for record in result[of]:
            if record["route"] == "branch" and f"{prefix}forward_macs" in record:
                counted, expected = (sum(record[f"{p}{way}_macs"] for way in WAYS) for p in (prefix, by_hand))
                ratios.setdefault(record["method"], {}).setdefault(of, []).append(counted / expected)
    if not ratios:
        return []
    rows = [(method, *(_range(found.get(of, [])) for of in ("macs", "xla"))) for method, found in ratios.items()]
    lead = "What the frameworks count over what is counted by hand, by branch, in all models and at all tokens"
    return [f"{lead}:", *table(("method", "torch: whole models", "XLA: the projections of a layer"), rows)]


def _range(values: list[float]) -> str | None:
    return f"{min(values):.3f} to {max(values):.3f}" if values else None


def _theory(result: Result) -> list[str]:
    gates = [
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
        *table(("gate", "value", "bounds", ""), gates),
        *table(
            ("sharing", "a split of the value update", "largest error of noise-free fits", "identified"), identified
        ),
    ]


def _fields(**names: tuple[str, ...]) -> Callable[[Result], list[str]]:
    """A section that is one table for each of some lists of a result."""

    def section(result: Result) -> list[str]:
        return [line for of, fields in names.items() if result.get(of) for line in records_table(result[of], *fields)]

    return section


TABLES: Final[dict[str, Callable[[Result], list[str]]]] = {
    "cost": _cost,
    "theory": _theory,
    "sample-efficiency": _fields(
        curve=("method", "fraction", "learning_rate", "mean_pct", "low_pct", "high_pct"),
    ),
    "ablate": _fields(
        rows=(
            "factor",
            "value",
            "steps",
            "learning_rate",
            "mean_pct",
            "low_pct",
            "high_pct",
            "difference_pct",
            "over_default_pct",
            "over_lora_pct",
            "params_count",
        ),
        controls=("backend", "method", "accuracy_pct", "shuffled_pct", "chance_bound_pct", "at_chance"),
    ),
    "similarity": _fields(
        trials=("method", "seed", "accuracy_pct", "loss", "params_count"),
        summary=("method", "projection", "mean_cosine_b", "mean_cosine_delta", "participation_ratio"),
        start=("parametrisation", "participation_ratio", "mean_cosine_of_columns"),
    ),
    "speed": _fields(
        steps=(
            "backend",
            "method",
            "median_s",
            "examples_per_s",
            "tokens_per_s",
            "over_lora",
            "over_frozen",
            "kept_over_lora",
            "first_step_s",
            "compile_s",
        ),
        inference=("backend", "method", "form", "median_s", "over_frozen"),
        operations=("backend", "method", "operation", "median_s"),
    ),
}
