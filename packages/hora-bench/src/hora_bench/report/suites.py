"""Suites of tasks: their means over tasks, and paired differences from LoRA, from whatever runs there are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from hora_bench.data.catalog import FAMILIES
from hora_bench.data.commonsense import TASKS
from hora_bench.stats import Difference
from hora_bench.store import RunResult

# suite: the claim, points above LoRA, the command that settles it
SUITES: Final = {
    "vtab": ("VTAB-1K: mean 74.4, 2.2 above LoRA", 2.2, "hora-bench run vtab DIR --tune --seeds 0-4"),
    "fgvc": ("FGVC: mean 89.96, 5.2 above LoRA", 5.2, "hora-bench run fgvc DIR --tune --seeds 0-4"),
    "commonsense": (
        "commonsense reasoning: 1.7 above LoRA on LLaMA-7B, 2.6 on 13B",
        1.7,
        "hora-bench run commonsense --config llama-7b --seeds 0-4",
    ),
}
SEARCHED: Final = {"learning_rate", "weight_decay"}
Circumstances = tuple[str, ...]


def members_of(suite: str) -> tuple[str, ...]:
    """Names of the tasks whose results make up the mean: of runs, or of groups within a run."""
    members = FAMILIES[suite].members
    return tuple(f"{suite}/{member}" for member in members) if members else TASKS


def means(suite: str, runs: Sequence[RunResult]) -> dict[tuple[str, Circumstances], dict[int, float]]:
    """Mean over all tasks of the suite, per method with its options and circumstances, and seed.

    A seed counts only if every task was tested with it. Rates may differ between tasks, since each is searched alone.
    """
    found: dict[tuple[str, Circumstances], dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        asked = run.request
        if asked.task.partition("/")[0] != suite or asked.score_on != "test":
            continue
        searched = SEARCHED if run.trials else set()
        hidden = {"task", "seed", "steps", "warmup_steps", "method", "options"} | searched
        code = run.inputs.code_sha256 if run.inputs else ""  # tasks run by different code make no mean
        what = (f"{asked.method} {asked.options}", (asked.model_dump_json(exclude=hidden), str(bool(run.trials)), code))
        groups = run.scores.groups_pct or {asked.task: run.scores.accuracy_pct}
        found[what][asked.seed].update(groups)
    wanted = members_of(suite)
    whole = {
        what: {
            seed: float(np.mean([of[name] for name in wanted])) for seed, of in seeds.items() if set(wanted) <= set(of)
        }
        for what, seeds in found.items()
    }
    return {what: seeds for what, seeds in whole.items() if seeds}


def compared(suite: str, runs: Sequence[RunResult]) -> Iterator[tuple[str, Difference]]:
    """Every method's mean less that of LoRA under the same circumstances, over the seeds that both have."""
    found = means(suite, runs)
    for (method, circumstances), own in found.items():
        for (other, theirs_at), theirs in found.items():
            seeds = sorted(set(own) & set(theirs))
            if not method.startswith("lora ") and other.startswith("lora ") and circumstances == theirs_at and seeds:
                difference = Difference.of([own[s] for s in seeds], [theirs[s] for s in seeds])
                accuracy = np.mean([own[s] for s in seeds])
                yield (
                    f"{method.partition(' ')[0]} has {accuracy:.2f} % on all {len(members_of(suite))} tasks",
                    difference,
                )
