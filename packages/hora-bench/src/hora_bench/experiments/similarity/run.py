"""Adapters after equal training, compared head by head and by the spectrum of their updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from hora_spec import ACTIVATIONS, AdapterSpec, HoraError, LayerShape

from hora_bench.backends import trained
from hora_bench.data.base import Score
from hora_bench.data.images import ImageTask
from hora_bench.methods import find
from hora_bench.request import FINAL, Inputs, Request, vary
from hora_bench.run import EVAL_BATCH
from hora_bench.setting import Setting
from hora_bench.store import Journal
from hora_bench.training import predict

from .measures import factors_of, measure, shares_of, start

COMPARED: Final = ("hora", "lora")  # families whose update is B A of each head
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
    setting: Setting,
    *,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0,),
    journal: Journal | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Train every method alike and measure its updates.

    Parameters
    ----------
    setting
        Base request, on torch, and data.
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
    setting.check_images()
    if setting.base.backend != "torch":
        raise HoraError(f"updates are compared on torch, got backend {setting.base.backend}: leave it out")
    others = [name for name in methods if find(name).family not in COMPARED]
    if others or not methods:
        got = ", ".join(others) or "none"
        raise HoraError(f"updates are compared head by head, of HoRA's methods and LoRA, got {got}: name such methods")
    journal, task = journal or Journal(None), setting.load(setting.base.task)
    requests = [vary(setting.base, method=m, seed=s, backend="torch", **FINAL) for m in methods for s in seeds]
    trials, layers = [], []
    for asked in requests:
        key = [asked.model_dump(), Inputs.of(asked, task).model_dump()]
        outcome, records = journal.once(key, lambda asked=asked: _measure(asked, task))
        which = {"method": asked.method, "seed": asked.seed}
        trials.append({**which, **outcome})
        layers += [{**which, **record} for record in records]
        progress(len(trials), len(requests))
    return {
        "setting": {**setting.base.model_dump(), **FINAL, "seeds": list(seeds)},
        "start": starts(),
        "trials": trials,
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


def _measure(asked: Request, task: ImageTask) -> list[Any]:
    """Outcome of one training, and one record per layer and projection."""
    learner, _, curve = trained(asked, task)
    outputs = predict(learner.outputs, task.eval_batches(asked.score_on, EVAL_BATCH["images"]))
    score = Score.of(task.judge(asked.score_on, outputs))
    outcome = {
        "accuracy_pct": round(score.accuracy_pct, 3),
        "loss": round(float(np.mean(curve.loss[-10:])), 5),
        "params_count": learner.params_count,
    }
    shares, records = shares_of(learner.model), []
    for (layer, p), factors in sorted(factors_of(learner.model).items()):
        share = {"generated_share": round(shares[layer, p], 4)} if shares else {}
        records.append({"layer": layer, "projection": p, **measure(factors), **share})
    return [outcome, records]


def _summary(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over layers and seeds."""
    keys = ("mean_cosine_b", "mean_cosine_delta", "participation_ratio", "generated_share")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in layers:
        groups.setdefault((record["method"], record["projection"]), []).append(record)
    return [
        {
            "method": method,
            "projection": projection,
            **{key: round(float(np.mean([r[key] for r in records])), 4) for key in keys if key in records[0]},
        }
        for (method, projection), records in groups.items()
    ]
