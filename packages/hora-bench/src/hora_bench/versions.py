"""What a number depends on besides its request: versions, code and the machine."""

import os
import platform
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import psutil

PACKAGES: Final = (
    "hora-spec",
    "hora-torch",
    "hora-jax",
    "hora-bench",
    "numpy",
    "scipy",
    "pillow",
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
# of this package
RUNS: Final = (
    "data",
    "models",
    "backends",
    "methods.py",
    "recipe.py",
    "training.py",
    "run.py",
    "screen.py",
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


def code_sha256(backend: str) -> str:
    """Digest of the sources that a run of a backend goes through: a version stays while its code is worked on."""
    own = (Path(__file__).parent / name for name in RUNS)
    return sources_sha256(_folder("hora_spec"), _folder(f"hora_{backend}"), *own)


@cache  # the code that a process runs does not change
def sources_sha256(*places: Path) -> str:
    """Digest of Python files and of folders of them."""
    digest = sha256()
    for place in places:
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _folder(package: str) -> Path:
    found = find_spec(package)
    return Path(found.origin).parent if found and found.origin else Path()


def machine() -> dict[str, Any]:
    """What a run ran on, without names of hosts or users."""
    threads = os.environ.get("OMP_NUM_THREADS")
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores_count": psutil.cpu_count(logical=True),
        "memory_bytes": psutil.virtual_memory().total,
        "omp_threads_count": int(threads) if threads and threads.isdigit() else None,
    }
