"""Results on disk: one JSON per run with its adapter and predictions beside, one JSON per experiment, and journals."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

from hora_spec import HoraError
from pydantic import ValidationError

from hora_bench.cache import needs_room, new_file, read_json
from hora_bench.request import Inputs, Record, Request, first_error, name_of
from hora_bench.versions import machine, versions

SCHEMA_VERSION = 2
PREDICTIONS = "predictions.jsonl"


class Scores(Record):
    """Accuracy and loss on the split that the request names."""

    accuracy_pct: float
    correct_count: int
    total_count: int
    loss: float | None
    groups_pct: dict[str, float]


class Measured(Record):
    """What depends on the machine and the moment."""

    train_time_s: float
    step_time_s: float
    eval_time_s: float
    peak_memory_bytes: int
    step_seconds: list[float]
    machine: dict[str, Any]


class Trial(Record):
    """One setting of the search."""

    learning_rate: float
    weight_decay: float
    seed: int = 0
    accuracy_pct: float | None
    loss: float | None = None
    final_loss: float | None
    file: str | None


class RunResult(Record):
    """One finished run.

    Everything outside `measured` is the same when the run is repeated, or killed and resumed, on the same machine.
    `files` are in a folder with the name of the result, beside it.
    """

    schema_version: Literal[2]
    command: str
    request: Request
    inputs: Inputs | None
    data: dict[str, Any]
    weights: dict[str, Any]
    trained_params_count: int
    total_params_count: int
    train_count: int | None
    labels_count: int | None
    scores: Scores
    loss: list[float]
    unreadable_images: dict[str, str]
    trials: list[Trial]
    files: dict[str, str]
    measured: Measured

    @property
    def name(self) -> str:
        """File name without ending."""
        if self.inputs is None:
            raise HoraError("results of schema version 1 keep the name of their file, got a request for a new one")
        return name_of(self.request, self.inputs)

    def write(self, directory: Path) -> Path:
        """Write ``NAME.json``, whole or not at all."""
        path = directory / f"{self.name}.json"
        with new_file(path) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n")
        return path


def read(path: Path) -> RunResult:
    """A result file, of this schema version or of version 1.

    Raises
    ------
    HoraError
        It does not fit the schema; the message names the first field that is wrong.
    """
    content = read_json(path)
    try:
        if isinstance(content, dict) and content.get("schema_version") == 1:
            return RunResult.model_validate_json(json.dumps(_from_1(content)))
        return RunResult.model_validate_json(path.read_text())
    except (ValidationError, KeyError) as error:
        what, where = first_error(error) if isinstance(error, ValidationError) else (f"no {error}", "")
        raise HoraError(
            f"{path.name} must follow schema version {SCHEMA_VERSION}, got {what} at {where or 'the file'}: "
            "see hora-bench schema"
        ) from error


def _from_1(old: dict[str, Any]) -> dict[str, Any]:
    """A result of schema version 1: beams and versions move, what was not recorded is None, no value changes."""
    asked, measured = dict(old["request"]), dict(old["measured"])
    asked.pop("examples_sha256", None)
    written = asked["scoring"] == "generation"
    return {
        **old,
        "schema_version": SCHEMA_VERSION,
        "request": {**asked, "beams": 4 if written and asked["backend"] == "torch" else 1},
        "inputs": None,
        "train_count": None,
        "labels_count": None,
        "scores": {**old["scores"], "loss": None},
        "files": {},
        "measured": {key: value for key, value in measured.items() if key != "versions"},
    }


def read_all(directory: Path) -> list[RunResult]:
    """All result files below a directory, in the order of their names."""
    return [read(path) for path in sorted(directory.rglob("*.json")) if is_result(path)]


def is_result(path: Path) -> bool:
    """Whether a JSON file claims to be a run's result."""
    content = read_json(path)
    return isinstance(content, dict) and "schema_version" in content and "request" in content


def right(directory: Path, result: RunResult) -> list[bool]:
    """Whether each example of a run was right, from the predictions beside its result file in `directory`."""
    lines = (directory / result.name / PREDICTIONS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["right"] for line in lines]


def schema() -> dict[str, Any]:
    """JSON Schema of a result file."""
    return RunResult.model_json_schema()


def check_writable(directory: Path) -> None:
    """Raise HoraError where nothing can be written into a directory, before hours are spent on what goes there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):  # without a name: a kill leaves nothing
            pass
    except OSError as error:
        why = os.strerror(error.errno or 0).lower()
        raise HoraError(f"{directory} must be a directory that can be written to, got {why!r}: pass another") from error


def check_file(path: Path) -> None:
    """Raise HoraError where a file of results could not be written, before hours are spent on what goes there."""
    if path.is_dir():
        raise HoraError(f"{path} must be a file, got a directory: add a name, such as {path / 'result.json'}")
    check_writable(path.parent)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, whole or not at all."""
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_experiment(path: Path, experiment: str, command: str, *, seconds: float, result: dict[str, Any]) -> None:
    """Write an experiment's result with its command, versions, machine and duration; whole or absent.

    Every record of a table is a line of the file, so that a change of one number is a change of one line.
    """
    here = machine()
    content = {
        "experiment": experiment,
        "command": command,
        "time_s": round(seconds, 1),
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cores_count": here["cores_count"],
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


class Journal:
    """Finished pieces: JSON lines of ``[[context, key], value]``; a last line cut by a kill is dropped.

    Parameters
    ----------
    path
        The file, made with the first piece; None keeps nothing.
    context
        What every piece depends on, such as `Inputs`: pieces of another context are not taken over.

    Examples
    --------
    >>> journal = Journal(None)
    >>> journal.once({"seed": 0}, lambda: 3), journal.once({"seed": 0}, lambda: 4)
    (3, 3)
    """

    def __init__(self, path: Path | None, context: Any = None) -> None:
        self._path = path
        self._context = context
        self._values: dict[str, Any] = {}
        if path is not None and path.exists():
            lines = path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            if whole != lines:
                path.write_text("".join(whole))
            self._values = {json.dumps(key): value for key, value in map(json.loads, whole)}

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """The value kept for `key`, or computed and kept now; both JSON values."""
        name = json.dumps([self._context, key])
        if name not in self._values:
            self._values[name] = compute()
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with needs_room(self._path), self._path.open("a") as lines:
                    lines.write(json.dumps([[self._context, key], self._values[name]]) + "\n")
        return self._values[name]

    def remove(self) -> None:
        """Delete the file: the experiment is complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
