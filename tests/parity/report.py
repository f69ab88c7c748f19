"""The parity report: which rules of the specification were exercised, by how many cases, and how near to its bound.

Tests record comparisons in a `Tally`; its lines travel to the reporting process as properties of the test, with
or without pytest-xdist, and `Report` folds them together. A ratio is an error divided by its bound: 1 is the limit.
"""

import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "docs" / "spec.md"

PARAMS_BOUND = 1e-13
LOSS_BOUND = 5e-6
LOGITS_BOUND = 2e-14
JOINT_BOUND = 2e-5
"""Relative bounds where errors pass through a whole model. What is promised is 1e-9 for parameters trained in float64
and 1e-4 for float32 losses; these are ten to forty times what rounding does: a difference could hide below the promise.
"""

EXACT = "exact"
"""Unit of a family that allows no error: its ratio is 0 or the test fails."""


ANY = ""
"""In place of a rule: all cases of a family and backend, each counted once."""


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of comparison: what is compared, and what bounds it (`EXACT` for equality to the bit)."""

    title: str
    bound: str

    @property
    def exact(self) -> bool:
        """Whether no error is allowed."""
        return self.bound == EXACT


KIT = "`hora_spec.testing.tolerance`, derived per element"
FAMILIES: dict[str, Family] = {
    "init": Family("initial values", EXACT),
    "factors": Family("factors of every projection", KIT),
    "delta": Family("dense update", KIT),
    "linear": Family("adapted projection, branch and merge routes", KIT),
    "linear gradients": Family("backward pass of the adapted projection", KIT),
    "gradients": Family("gradient of every parameter", KIT),
    "goldens": Family("the stored arrays of every golden case", KIT),
    "torch against JAX": Family("the same arrays, torch against JAX directly", "twice the bound of either"),
    "laws": Family("what holds whatever the numbers are", KIT),
    "merge": Family("merged weights in every layout", EXACT),
    "unmerge": Family("the base after merging and unmerging", EXACT),
    "model": Family("logits of whole models: adapted, merged, exported to LoRA", f"{LOGITS_BOUND:g} relative, float64"),
    "lora": Family("files of the LoRA export", EXACT),
    "joint start": Family(
        "A as the gradient of all heads asks for it", f"{JOINT_BOUND:g} of its largest entry, float32"
    ),
    "training, float64": Family("parameters after 50 AdamW steps", f"{PARAMS_BOUND:g} relative"),
    "training, float32": Family("loss curves of 50 AdamW steps", f"{LOSS_BOUND:g} relative"),
    "exchange": Family("training handed over between frameworks", f"{PARAMS_BOUND:g} relative, float64"),
    "files": Family("tensor files of equal parameters, byte for byte", EXACT),
    "borders": Family("bad input refused by both with a HoraError, nothing changed", EXACT),
    "mutants": Family("deliberately wrong backends, all caught", EXACT),
}


@dataclass(frozen=True, slots=True)
class Line:
    """Comparisons of one family by one backend under one rule, or `ANY`: how many, the worst ratio, where it was."""

    rule: str
    family: str
    backend: str
    cases: int
    worst: float
    where: str

    def __add__(self, other: "Line") -> "Line":
        worse = other if other.worst > self.worst or math.isnan(other.worst) else self
        return replace(worse, cases=self.cases + other.cases)


@dataclass(slots=True)
class Tally:
    """What one test compared; `test` is its pytest id."""

    test: str
    lines: list[dict[str, Any]]

    def add(self, family: str, backend: str, rules: Iterable[str], ratio: float = 0.0, case: Any = None) -> None:
        """Count one case under each of its rules.

        Parameters
        ----------
        family
            A key of `FAMILIES`.
        backend
            Whose numbers they are.
        rules
            Rules of the specification that the case exercises.
        ratio
            Worst error divided by its bound.
        case
            The `hora_spec.testing.Case`, when the test runs more than one: what ``--case`` takes to replay it.
        """
        if family not in FAMILIES:
            raise KeyError(f"{family!r} is not a family of the report")
        if unknown := sorted(set(rules) - set(rules_of_spec())):
            raise KeyError(f"{unknown} are not rules of the specification")
        where = self.test if case is None else f'{self.test} --case "{case!r}"'
        self.lines += [
            asdict(Line(rule, family, backend, 1, float(ratio), where)) for rule in (ANY, *sorted(set(rules)))
        ]


@dataclass(slots=True)
class Report:
    """All lines of a session, folded by rule, family and backend, and the tests that failed."""

    lines: dict[tuple[str, str, str], Line] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def fold(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add the lines of one test."""
        for line in (Line(**each) for each in lines):
            key = (line.rule, line.family, line.backend)
            self.lines[key] = self.lines[key] + line if key in self.lines else line

    def by_rule(self) -> dict[str, Line | None]:
        """One line for every rule of the specification, None where no case ran."""
        return {rule: self._worst(lambda line, rule=rule: line.rule == rule) for rule in rules_of_spec()}

    def by_family(self) -> dict[tuple[str, str], Line]:
        """One line for every family and backend, in the order of `FAMILIES`."""
        found = [line for line in self.lines.values() if line.rule == ANY]
        found.sort(key=lambda line: (list(FAMILIES).index(line.family), line.backend))
        return {(line.family, line.backend): line for line in found}

    def problems(self) -> list[str]:
        """Why this is no proof yet: failed tests, what has no cases, and bounds exceeded or never approached."""
        found = [f"{test} failed" for test in self.failures]
        found += [f"rule {rule} has no cases" for rule, line in self.by_rule().items() if line is None]
        for name, family in FAMILIES.items():
            line = self._worst(lambda x, name=name: x.family == name)
            if line is None:
                found.append(f"family {name!r} has no cases")
            elif not line.worst < 1:
                found.append(f"family {name!r} exceeds its bound: {line.worst:.3g} at {line.where}")
            elif family.exact and line.worst:
                found.append(f"family {name!r} is exact, and differs: {line.worst:.3g} at {line.where}")
            elif not family.exact and line.worst <= 0.01:
                found.append(f"family {name!r} never approaches its bound: {line.worst:.3g}; tighten it")
        return found

    def write(self, folder: Path, *, complete: bool) -> None:
        """``parity-report.md`` and ``parity-report.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        problems = self.problems()
        data = {
            "complete": complete,
            "problems": problems,
            "lines": [asdict(line) for _, line in sorted(self.lines.items())],
        }
        (folder / "parity-report.json").write_text(json.dumps(data, indent=1, allow_nan=True) + "\n")
        (folder / "parity-report.md").write_text(self.markdown(complete=complete))

    def markdown(self, *, complete: bool) -> str:
        """The report as the documentation shows it."""
        problems = self.problems()
        verdict = "Not a proof yet:" if problems else "Every rule has cases, every error is within its bound."
        if not complete:
            verdict = f"A part of the session ran, so this is no verdict. {verdict if problems else ''}".rstrip()
        by_rule = self.by_rule()
        comparisons = [
            (FAMILIES[family].title, backend, FAMILIES[family].bound, str(line.cases), _ratio(line))
            for (family, backend), line in self.by_family().items()
        ]
        rules = [
            (rule, str(line.cases), _ratio(line), f"{line.family}, {line.backend}") if line else (rule, "none", "", "")
            for rule, line in by_rule.items()
        ]
        replays = dict.fromkeys(f"{replay(line.where)}  # {line.family}" for line in by_rule.values() if line)
        parts = (
            ("## Parity of torch and JAX", verdict),
            *([f"- {problem}" for problem in problems],) * bool(problems),
            ("### By comparison",),
            _table(("comparison", "backend", "bound", "cases", "worst error / bound"), comparisons),
            ("### By rule", "The comparison that came nearest to its bound, for each rule of the specification."),
            _table(("rule", "cases", "worst error / bound", "comparison and backend"), rules),
            ("### Worst cases", "Each line runs one of them again."),
            ("```sh", *replays, "```"),
        )
        return "\n\n".join("\n".join(part) if part[0][0] in "-|`" else "\n\n".join(part) for part in parts) + "\n"

    def _worst(self, wanted: Any) -> Line | None:
        total: Line | None = None
        for line in filter(wanted, self.lines.values()):
            total = line if total is None else total + line
        return total


@cache
def rules_of_spec() -> list[str]:
    """Identifiers of the rules that two backends can differ in, in the order of the specification."""
    return [rule for rule in re.findall(r"^### ([A-Z]\d+)\. ", SPEC.read_text(), re.MULTILINE) if rule not in OF_FILES]


OF_FILES = ("M4", "F8", "F9", "F10")
"""Rules of what hora-spec makes of the files of either backend: merged checkpoints, sums, GGUF, exports read back."""


def replay(where: str) -> str:
    """The command that runs one case again."""
    test, case, value = where.partition(" --case ")
    return f"nox -s parity -- -n0 --only {shlex.quote(test)}{case}{value}"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *rows)]


def _ratio(line: Line) -> str:
    return "equal" if FAMILIES[line.family].exact and not line.worst else f"{line.worst:.3g}"
