"""The whole experiment: identification, then rates, in pieces that survive a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .identify import SPLITS, identify
from .model import NOISE, SHARINGS, TOKENS, WIDTH, count_params
from .rates import BOOTSTRAP, GRIDS, LIMITS, curves, gates, measure

Piece = dict[str, Any]


def _finished(journal: Path, run: dict[str, Any]) -> list[Piece]:
    """Pieces of the same run in the journal; a last line cut by a kill is dropped."""
    if not journal.exists():
        return []
    pieces = []
    for line in journal.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            piece = json.loads(line)
            if piece["run"] == run:
                pieces.append(piece)
    journal.write_text("".join(json.dumps(piece) + "\n" for piece in pieces))
    return pieces


def theory(
    size: str = "default",
    *,
    seed: int = 0,
    journal: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Identification and rates of recovery, with gates and limits.

    Parameters
    ----------
    size
        ``"quick"`` (seconds, gates not judged), ``"default"`` (about a minute) or ``"full"`` (an hour; also the
        sharings "a" and "b").
    seed
        Problem, samples and starts of trial t follow from ``(seed, t)``.
    journal
        File that keeps finished pieces; a run that finds its own pieces there goes on from them.
    progress
        Called with pieces done and pieces in total.

    Returns
    -------
    dict
        ``setting``, ``identify`` (one record per sharing), ``pieces`` (losses of every trial), ``curves``,
        ``gates`` (empty when quick) and ``limits``.
    """
    grid = GRIDS[size]
    run = {"seed": seed, "sizes": list(grid.sizes)}
    done = {tuple(piece["key"]): piece["losses"] for piece in (_finished(journal, run) if journal else [])}
    for key in grid.pieces():
        if key not in done:
            done[key] = measure(*key, sizes=grid.sizes, seed=seed)
            if journal:
                with journal.open("a") as lines:
                    lines.write(json.dumps({"run": run, "key": key, "losses": done[key]}) + "\n")
        progress(len(done), len(list(grid.pieces())))
    records = curves(grid, done)
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
        "pieces": [
            {"fitted_heads": heads, "sharing": sharing, "trial": trial, **done[heads, sharing, trial]}
            for heads, sharing, trial in grid.pieces()
        ],
        "curves": records,
        "gates": [] if size == "quick" else gates(records),
        "limits": list(LIMITS),
    }
