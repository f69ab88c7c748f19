"""Accuracy against the share of training data, every method tuned alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from hora_bench.experiments.intervals import mean_interval
from hora_bench.experiments.setting import Setting, vary
from hora_bench.experiments.svg import save
from hora_bench.experiments.tuned import tuned

METHODS: Final = ("lora", "mh-lora", "hora", "hora-residual")
FRACTIONS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
NOTES: Final = tuple(
    """\
The number of steps is the same for every fraction, so a smaller one is seen more often (the paper's protocol).
The learning rate of each method and fraction is the best of the same rates on validation, one seed; the test split is \
judged once per seed, after training on training and validation examples.
Intervals: answers of the test split (Wilson), and scatter between seeds.\
""".splitlines()
)


def sample_efficiency(
    setting: Setting,
    out: Path,
    *,
    methods: Sequence[str] = METHODS,
    fractions: Sequence[float] = FRACTIONS,
    learning_rates: Sequence[float] = (1e-3, 3e-3, 1e-2),
    seeds: Sequence[int] = (0, 1),
    command: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Tune each method at each fraction on validation, then test.

    Parameters
    ----------
    setting
        Base request and data.
    out
        Folder of the runs' result files; runs found there are not repeated.
    methods, fractions, learning_rates, seeds
        What is crossed; the first seed tunes.
    command, progress
        Recorded in the runs' files, and a callback with points done and in total.

    Returns
    -------
    dict
        ``setting``; ``search``, every rate tried; ``curve``, per method and fraction the tuned rate and the test
        accuracy with its interval; ``notes``.
    """
    task, search, points = setting.load(setting.base.task), [], []
    for method in methods:
        for fraction in fractions:
            here = vary(setting.base, method=method, fraction=fraction)
            found, trials = tuned(here, task, out, learning_rates=learning_rates, seeds=seeds, command=command)
            accuracies = [result.scores.accuracy_pct for result in found]
            which = {"method": method, "fraction": fraction}
            search += [{**which, **trial.model_dump(exclude={"file"})} for trial in trials]
            interval = mean_interval(accuracies, found[0].scores.total_count)
            points.append(
                {**which, "learning_rate": found[0].request.learning_rate, **interval, "accuracies_pct": accuracies}
            )
            progress(len(points), len(methods) * len(fractions))
    return {
        "setting": {**setting.base.model_dump(), "learning_rates": list(learning_rates), "seeds": list(seeds)},
        "search": search,
        "curve": points,
        "notes": list(NOTES),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Write the curve with intervals as SVG."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for index, method in enumerate(dict.fromkeys(point["method"] for point in result["curve"])):
        points = [point for point in result["curve"] if point["method"] == method]
        x = [100 * point["fraction"] * (1 + 0.03 * index) for point in points]
        mean = [point["mean_pct"] for point in points]
        errors = [[p["mean_pct"] - p["low_pct"] for p in points], [p["high_pct"] - p["mean_pct"] for p in points]]
        axis.errorbar(x, mean, errors, marker="o", markersize=4, capsize=2, label=method)
    axis.set_xscale("log")
    axis.set_xlabel("training data, %")
    axis.set_ylabel("test accuracy, %")
    axis.legend(frameon=False)
    save(figure, path)
