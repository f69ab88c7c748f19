"""The whole experiment: identification, then rates, in pieces that survive a kill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from hora_bench.store import Journal

from .identify import SPLITS, identify
from .model import NOISE, SHARINGS, TOKENS, WIDTH, count_params
from .rates import BOOTSTRAP, GRIDS, LIMITS, curves, gates, measure


def theory(
    size: str = "default",
    *,
    seed: int = 0,
    journal: Journal | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Identification and rates of recovery, with gates and limits.

    Parameters
    ----------
    size
        ``"quick"`` (seconds, gates not judged), ``"default"`` (about a minute) or ``"full"`` (some 20 minutes; also
        the sharings "a" and "b").
    seed
        Problem, samples and starts of trial t follow from ``(seed, t)``.
    journal
        Keeps finished pieces; a run that finds its own there goes on from them.
    progress
        Called with pieces done and pieces in total.

    Returns
    -------
    dict
        ``setting``, ``identify`` (one record per sharing), ``pieces`` (losses of every trial), ``curves``,
        ``gates`` (empty when quick) and ``limits``.
    """
    grid = GRIDS[size]
    journal = journal or Journal(None)
    pieces, done = list(grid.pieces()), {}
    for heads, sharing, trial in pieces:
        key = {"heads": heads, "sharing": sharing, "trial": trial, "sizes": list(grid.sizes), "seed": seed}
        done[heads, sharing, trial] = journal.once(
            key, partial(measure, heads, sharing, trial, sizes=grid.sizes, seed=seed)
        )
        progress(len(done), len(pieces))
    records = curves(grid, done)
    found = [
        {"fitted_heads": heads, "sharing": sharing, "trial": trial, **done[heads, sharing, trial]}
        for heads, sharing, trial in pieces
    ]
    return {
        "setting": {
            "size": size,
            "seed": seed,
            "sizes": list(grid.sizes),
            "trials": grid.trials,
            "width": WIDTH,
            "tokens": TOKENS,
            "noise": NOISE,
            "bootstrap": BOOTSTRAP,
            "params_count": {s: count_params(s, 2) for s in SHARINGS},
        },
        "identify": [
            {**asdict(found), "splits": list(SPLITS), "identified": found.identified}
            for found in (identify(sharing, seed=seed) for sharing in SHARINGS)
        ],
        "pieces": found,
        "curves": records,
        "gates": [] if size == "quick" else gates(grid.sizes, found),
        "limits": list(LIMITS),
    }
