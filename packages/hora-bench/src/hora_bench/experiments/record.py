"""The file of an experiment: what ran, where, and what came out."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from hora_bench.cache import new_file

PACKAGES: Final = (
    "hora-spec",
    "hora-torch",
    "hora-jax",
    "hora-bench",
    "numpy",
    "scipy",
    "torch",
    "peft",
    "accelerate",
    "transformers",
    "timm",
    "jax",
    "flax",
    "optax",
    "qwix",
)


def versions() -> dict[str, str]:
    """Versions of the packages that can change a number."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def write_record(path: Path, experiment: str, command: str, *, seconds: float, result: dict[str, Any]) -> None:
    """Write an experiment's result with its command, versions, machine and duration; whole or absent.

    Every record of a table is a line of the file, so that a change of one number is a change of one line.
    """
    content = {
        "experiment": experiment,
        "command": command,
        "time_s": round(seconds, 1),
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cores_count": os.cpu_count(),
            "omp_threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "versions": versions(),
        "result": result,
    }
    with new_file(path) as temporary:
        temporary.write_text(_lines(content) + "\n")


def _lines(value: Any, depth: int = 0) -> str:
    """JSON of two levels of mappings and of tables below, one entry or table record per line."""
    table = isinstance(value, list) and any(isinstance(item, dict) for item in value)
    nested = isinstance(value, dict) and depth < 2 and any(isinstance(item, (dict, list)) for item in value.values())
    if not (table or nested):
        return json.dumps(value)
    entries = (
        map(json.dumps, value)
        if table
        else (f"{json.dumps(key)}: {_lines(item, depth + 1)}" for key, item in value.items())
    )
    opening, closing = "[]" if table else "{}"
    indent = "\n" + " " * depth
    return opening + ",".join(f"{indent} {entry}" for entry in entries) + indent + closing
