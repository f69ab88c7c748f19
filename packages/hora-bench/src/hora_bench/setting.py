"""Experiment files: the request that every run starts from, and what is varied."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_type_hints

from hora_spec import HoraError
from pydantic import TypeAdapter, ValidationError

from hora_bench.data.catalog import FAMILIES, kind_of, load_task, plain_of
from hora_bench.request import Request, first_error, request, seeds_of

QUICK: Final[dict[str, Any]] = {"image_size_px": 28, "steps": 10, "warmup_steps": 1, "limit": 100}


@dataclass(frozen=True, slots=True)
class Setting:
    """The request that every run starts from, what is varied, and where data lies.

    Attributes
    ----------
    base
        Request before anything is varied.
    vary
        Fields of `hora_bench.sweep.Sweep`, or arguments of an experiment that is none.
    data
        Folder of tasks; what comes with packages needs none.
    """

    base: Request
    vary: dict[str, Any] = field(default_factory=dict)
    data: Path | None = None

    def check_images(self) -> None:
        """Raise HoraError where the tasks are not of images: what looks into a vision transformer needs one."""
        if self.base.kind != "images":
            raise HoraError(f"this looks into vision transformers, got a task of {self.base.kind}: name one of images")

    def load(self, task: str, asked: Request | None = None) -> Any:
        """A task by name, as a request wants its data; default the base request."""
        asked = asked or self.base
        scoring = None if asked.scoring == "accuracy" else asked.scoring
        family = FAMILIES.get(plain_of(task).partition("/")[0])
        data = None if family is not None and family.brings_data else self.data
        return load_task(
            task, model=asked.model, data=data, image_size=asked.image_size_px, scoring=scoring, limit=asked.limit
        )


def read_setting(path: Path | None, *, quick: dict[str, Any] | None, data: Path | None) -> Setting:
    """The setting of an experiment file, or the quick one on the embedded digits.

    Parameters
    ----------
    path
        TOML: a table ``[request]`` with fields of a request, a table ``[vary]``.
    quick
        What the quick setting varies, where it is asked for in place of a file.
    data
        Folder of tasks.

    Raises
    ------
    HoraError
        Neither or both are given, or the file is no TOML or has other tables, or the request other fields.
    """
    if (path is None) == (quick is None):
        given = "neither" if path is None else "both"
        raise HoraError(f"an experiment takes a file (experiments/*.toml) or --quick, got {given}: pass one of them")
    if path is None and data is not None:
        raise HoraError(f"the quick setting brings its data, got --data {data}: leave one of them out")
    if path is None:
        return Setting(request(**QUICK), dict(quick or {}), data)
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise HoraError(f"an experiment file is TOML, got {error} in {path.name}: fix the file") from error
    for name in ("request", "vary"):
        if not isinstance(content.get(name, {}), dict):
            raise HoraError(f"[{name}] of an experiment file is a table, got {content[name]!r} in {path.name}: fix it")
    known = Request.model_fields
    unknown = sorted({*content} - {"request", "vary"} | {*content.get("request", {})} - {*known})
    if unknown:
        raise HoraError(
            f"an experiment file has [request], with fields among {', '.join(known)}, and [vary], got {unknown} in "
            f"{path.name}"
        )
    varied = content.get("vary", {})
    return Setting(request(**_of_kind(content.get("request", {}), varied, data)), varied, data)


def _of_kind(fields: Mapping[str, Any], varied: Mapping[str, Any], data: Path | None) -> dict[str, Any]:
    """Fields of a request as the kind of its tasks has them: a file cannot say that there is no image size."""
    tasks = varied.get("tasks") or [fields.get("task", Request.model_fields["task"].default)]
    kinds = {kind_of(task, data) for task in tasks}
    if len(kinds) > 1:
        raise HoraError(f"the tasks of a file are of one kind, got {', '.join(sorted(kinds))}: write a file for each")
    if kinds == {"images"}:
        return dict(fields)
    if "image_size_px" in fields:
        raise HoraError(f"image_size_px belongs to images, got it for {tasks[0]}: leave it out")
    scored = {"scoring": "log-likelihood"} if kinds == {"text"} else {}
    return {"image_size_px": None, **scored, **fields}


def arguments_of(varied: Mapping[str, Any], run: Callable[..., Any], *names: str) -> dict[str, Any]:
    """What is varied, as arguments.

    Parameters
    ----------
    varied
        The table ``[vary]`` of a file, which may hold `names`.
    run
        Has them among its arguments, whose types their values must have.

    Raises
    ------
    HoraError
        The table holds something else, or a value does not fit.
    """
    if unknown := sorted(set(varied) - set(names)):
        raise HoraError(f"what is varied is among {', '.join(names)}, got {', '.join(unknown)}: see the guide")
    types, given = get_type_hints(run, include_extras=True), dict(varied)
    for name in {"seeds", "search_seeds"} & set(given):
        given[name] = seeds_of(given[name])
    for name, value in given.items():
        try:
            given[name] = TypeAdapter(types[name]).validate_python(value, strict=not isinstance(value, list))
        except ValidationError as error:
            what, where = first_error(error)
            place = f"{where} of {name}" if where else name
            raise HoraError(f"{place} in what is varied: {what}, got {value!r}: change it") from error
    return given
