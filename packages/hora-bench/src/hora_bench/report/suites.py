"""Suites of tasks: their means over tasks, and paired differences from LoRA, from whatever runs there are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from hora_bench.data.catalog import FAMILIES
from hora_bench.data.commonsense import TASKS
from hora_bench.stats import Difference
from hora_bench.store import RunResult


@dataclass(frozen=True, slots=True)
class Claim:
    """What the paper says of a suite of tasks.

    Attributes
    ----------
    suite, model
        Tasks, and a part of the name of the model that it is said of: runs of others do not judge it.
    text, points
        The claim, and by how much HoRA is above LoRA.
    command
        What settles it.
    """

    suite: str
    model: str
    text: str
    points: float
    command: str


BOTH: Final = "--method hora,lora --seeds 0-4"
VIT: Final = "vit_base_patch16_224"
CLAIMS: Final = (
    Claim("vtab", VIT, "VTAB-1K: mean 74.4, 2.2 above LoRA", 2.2, f"hora-bench run vtab DIR --tune {BOTH}"),
    Claim("fgvc", VIT, "FGVC: mean 89.96, 5.2 above LoRA", 5.2, f"hora-bench run fgvc DIR --tune {BOTH}"),
    *(
        Claim(
            "commonsense",
            f"llama-{size}",
            f"commonsense reasoning, LLaMA-{size.upper()}: {points} above LoRA",
            points,
            f"hora-bench run commonsense --config llama-{size} {BOTH}",
        )
        for size, points in (("7b", 1.7), ("13b", 2.6))
    ),
)
SEARCHED: Final = {"learning_rate", "weight_decay"}
Circumstances = tuple[str, ...]


def members_of(suite: str) -> tuple[str, ...]:
    """Names of the tasks whose results make up the mean: of runs, or of groups within a run."""
    members = FAMILIES[suite].members
    return tuple(f"{suite}/{member}" for member in members) if members else TASKS


def means(claim: Claim, runs: Sequence[RunResult]) -> dict[tuple[str, Circumstances], dict[int, float]]:
    """Mean over all tasks of the suite, per method with its options and circumstances, and seed.

    Screens, runs on parts of the data and runs of other models are left out. A seed counts only if every task was
    tested with it. Rates may differ between tasks, since each is searched alone.
    """
    found: dict[tuple[str, Circumstances], dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        asked = run.request
        if asked.task.partition("/")[0] != claim.suite or claim.model not in Path(asked.model).name.lower():
            continue
        if asked.score_on != "test" or asked.proxy or asked.limit is not None or asked.fraction != 1:
            continue
        searched = SEARCHED if run.trials else set()
        hidden = {"task", "seed", "steps", "warmup_steps", "method", "options"} | searched
        code = run.inputs.code_sha256 if run.inputs else ""  # tasks run by different code make no mean
        what = (f"{asked.method} {asked.options}", (asked.model_dump_json(exclude=hidden), str(bool(run.trials)), code))
        groups = run.scores.groups_pct or {asked.task: run.scores.accuracy_pct}
        found[what][asked.seed].update(groups)
    wanted = members_of(claim.suite)
    whole = {
        what: {
            seed: float(np.mean([of[name] for name in wanted])) for seed, of in seeds.items() if set(wanted) <= set(of)
        }
        for what, seeds in found.items()
    }
    return {what: seeds for what, seeds in whole.items() if seeds}


def compared(claim: Claim, runs: Sequence[RunResult]) -> Iterator[tuple[str, Difference]]:
    """Every method's mean less that of LoRA under the same circumstances, over the seeds that both have."""
    found = means(claim, runs)
    for (method, circumstances), own in found.items():
        for (other, theirs_at), theirs in found.items():
            seeds = sorted(set(own) & set(theirs))
            if not method.startswith("lora ") and other.startswith("lora ") and circumstances == theirs_at and seeds:
                difference = Difference.of([own[s] for s in seeds], [theirs[s] for s in seeds])
                accuracy = np.mean([own[s] for s in seeds])
                yield (
                    f"{method.partition(' ')[0]} has {accuracy:.2f} % on all {len(members_of(claim.suite))} tasks",
                    difference,
                )
