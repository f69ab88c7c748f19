"""Adapters after equal training, compared head by head and by the spectrum of their updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from hora_spec import ACTIVATIONS, AdapterSpec, LayerShape

from hora_bench.experiments.journal import Journal
from hora_bench.experiments.trial import Trial, factors, train

from .measures import measure, start

METHODS: Final = ("lora", "mh-lora", "hora", "hora-residual", "hora-generated-a")
NOTES: Final = tuple(
    """\
Cosines of updates (B A of a head) do not depend on a basis; cosines of B do: with one A they compare within it, with \
an A per head (mh-lora) they compare coordinates in different bases and mean nothing.
Participation ratio: (sum s^2)^2 / sum s^4 of the singular values of a projection's update, at most the rank (8), or \
heads x rank with an A per head.
At the start every update is zero; the start is what a random last layer would give (10 draws).
One task, one learning rate for all methods, few seeds: what is alike after this training, not why.\
""".splitlines()
)


def similarity(
    base: Trial,
    *,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0,),
    journal: Journal | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Train every method alike and measure its updates.

    Parameters
    ----------
    base
        The training, but for method and seed.
    methods
        HoRA variants and ``"lora"``.
    seeds
        The heat maps show the first.
    journal, progress
        Finished trials, and a callback with trials done and in total.

    Returns
    -------
    dict
        ``setting``; ``start`` per parametrisation; ``trials``; ``summary``, means over layers, heads and seeds per
        method and projection; ``layers``, every measurement of the first seed; ``notes``.
    """
    journal = journal or Journal(None)
    trials = [base.replace(method=method, seed=seed) for method in methods for seed in seeds]
    measured = []
    for done, trial in enumerate(trials, 1):
        measured.append(journal.once(trial.key(), lambda trial=trial: _measure(trial)))
        progress(done, len(trials))
    layers = [
        {"method": trial.method, "seed": trial.seed, **record}
        for trial, (_, records) in zip(trials, measured, strict=True)
        for record in records
    ]
    return {
        "setting": {**base.key(), "seeds": list(seeds)},
        "start": starts(),
        "trials": [
            {"method": trial.method, "seed": trial.seed, **outcome}
            for trial, (outcome, _) in zip(trials, measured, strict=True)
        ],
        "summary": _summary(layers),
        "layers": [record for record in layers if record["seed"] == seeds[0]],
        "notes": list(NOTES),
    }


def starts() -> list[dict[str, Any]]:
    """Spectra that parametrisations favour at the start, for the layers of ViT-S at rank 8."""
    layer = LayerShape.attention(384, 6)
    specs = {"lora": AdapterSpec(8, sharing="a"), "hora-residual": AdapterSpec(8, residual=True)}
    for a_source in ("direct", "hypernetwork"):
        specs |= {f"{name}, A {a_source}": AdapterSpec(8, activation=name, a_source=a_source) for name in ACTIVATIONS}
    return [{"parametrisation": name, **start(spec, layer)} for name, spec in specs.items()]


def _measure(trial: Trial) -> list[Any]:
    outcome, model = train(trial)
    records = [
        {"layer": layer, "projection": projection, **measure(found)}
        for (layer, projection), found in sorted(factors(model).items())
    ]
    return [outcome, records]


def _summary(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over layers and seeds."""
    keys = ("mean_cosine_b", "mean_cosine_delta", "participation_ratio")
    groups = dict.fromkeys((record["method"], record["projection"]) for record in layers)
    return [
        {
            "method": method,
            "projection": projection,
            **{
                key: round(
                    float(np.mean([r[key] for r in layers if (r["method"], r["projection"]) == (method, projection)])),
                    4,
                )
                for key in keys
            },
        }
        for method, projection in groups
    ]
