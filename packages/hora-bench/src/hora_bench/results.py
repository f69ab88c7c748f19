"""Result files: one JSON per run, a published schema, validated whenever one is read."""

import os
import platform
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import psutil
from hora_spec import HoraError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hora_bench.cache import new_file, read_json
from hora_bench.experiments.record import versions

SCHEMA_VERSION = 1


class Record(BaseModel):
    """Base of everything in a result file: no unknown fields, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Request(Record):
    """What was asked for; equal requests are the same run and have the same file name."""

    task: str
    model: str
    method: str
    options: dict[str, Any]
    backend: Literal["torch", "jax"]
    seed: int
    fraction: float = Field(gt=0, le=1)
    limit: int | None
    image_size_px: int | None
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    batch_size: int = Field(gt=0)
    steps: int = Field(gt=0)
    warmup_steps: int = Field(ge=0)
    train_on: Literal["train", "train+val"]
    score_on: Literal["val", "test"]
    scoring: Literal["accuracy", "log-likelihood", "generation"]
    dtype: Literal["float32", "bfloat16"]
    mesh: dict[str, int] | None
    remat: bool
    scan: bool
    examples_sha256: str | None = None

    @property
    def name(self) -> str:
        """File name without ending: readable parts and a digest of everything."""
        unknown = None if self.examples_sha256 else {"examples_sha256"}
        digest = sha256(self.model_dump_json(exclude=unknown).encode()).hexdigest()[:10]
        parts = (self.task, Path(self.model).name, self.method, self.backend, f"s{self.seed}", self.score_on)
        return "-".join(part.strip("/").replace("/", "_") for part in parts) + f"-{digest}"


class Scores(Record):
    """Accuracy on the split that the request names."""

    accuracy_pct: float
    correct_count: int
    total_count: int
    groups_pct: dict[str, float]


class Measured(Record):
    """What depends on the machine and the moment."""

    train_time_s: float
    step_time_s: float
    eval_time_s: float
    peak_memory_bytes: int
    step_seconds: list[float]
    machine: dict[str, Any]
    versions: dict[str, str]


class Trial(Record):
    """One setting of the search."""

    learning_rate: float
    weight_decay: float
    accuracy_pct: float | None
    final_loss: float | None
    file: str | None


class RunResult(Record):
    """One finished run.

    Everything outside `measured` is the same when the run is repeated, or killed and resumed, on the same machine.
    """

    schema_version: Literal[1]
    command: str
    request: Request
    data: dict[str, Any]
    weights: dict[str, Any]
    trained_params_count: int
    total_params_count: int
    scores: Scores
    loss: list[float]
    unreadable_images: dict[str, str]
    trials: list[Trial]
    measured: Measured

    def write(self, directory: Path) -> Path:
        """Write ``NAME.json``, whole or not at all."""
        path = directory / f"{self.request.name}.json"
        with new_file(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n")
        return path


def read(path: Path) -> RunResult:
    """A result file.

    Raises
    ------
    HoraError
        It does not fit the schema; the message names the first field that is wrong.
    """
    try:
        return RunResult.model_validate_json(path.read_text())
    except ValidationError as error:
        what, where = first_error(error)
        raise HoraError(
            f"{path.name} must follow schema version {SCHEMA_VERSION}, got {what} at {where or 'the file'}: "
            "see hora-bench schema"
        ) from error


def first_error(error: ValidationError) -> tuple[str, str]:
    """What is wrong, and in which field, of the first of the errors."""
    first = error.errors()[0]
    return first["msg"].lower(), ".".join(map(str, first["loc"]))


def read_all(directory: Path) -> list[RunResult]:
    """All result files below a directory, in the order of their names."""
    return [read(path) for path in sorted(directory.rglob("*.json")) if is_result(path)]


def is_result(path: Path) -> bool:
    """Whether a JSON file claims to be a run's result."""
    content = read_json(path)
    return isinstance(content, dict) and "schema_version" in content and "request" in content


def schema() -> dict[str, Any]:
    """JSON Schema of a result file."""
    return RunResult.model_json_schema()


def machine() -> dict[str, Any]:
    """What the run ran on, without names of hosts or users."""
    threads = os.environ.get("OMP_NUM_THREADS")
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cores_count": psutil.cpu_count(logical=True),
        "memory_bytes": psutil.virtual_memory().total,
        "omp_threads_count": int(threads) if threads else None,
    }


def environment() -> dict[str, Any]:
    """`machine` and versions, as `Measured` takes them."""
    return {"machine": machine(), "versions": versions()}
