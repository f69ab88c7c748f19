"""Which tests run for a mutant: those that run its lines.

Each test is recorded once, in a process of its own: what another test would have done for it, as a fixture of wider
scope or a cache does, is seen as well. A test that starts a process, or compiles with torch, is taken to run all.
"""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules import Module, digest
from runner import NotRun, Runner


@dataclass(frozen=True)
class Selection:
    """What the tests of a module run."""

    file: str
    at_import: frozenset[int]
    """Lines that are run before any test is."""
    fresh: bool
    """Whether every mutant needs an import of its own, since the tests start threads when they are imported."""
    recorded: Mapping[str, Mapping[str, Any]]

    @property
    def seconds(self) -> dict[str, float]:
        """Processor seconds of each test."""
        return {name: test["cpu_s"] for name, test in self.recorded.items()}

    @property
    def every(self) -> list[str]:
        """All tests, the quick ones first."""
        return sorted(self.recorded, key=self.seconds.__getitem__)

    def of(self, lines: range, kills: Counter[str]) -> tuple[list[str], bool]:
        """Tests that run any of these lines, those first that are quick and have killed, and whether to import anew."""
        at_import = not self.at_import.isdisjoint(lines)
        names = [name for name in self.every if at_import or self._runs(self.recorded[name], lines)]
        return sorted(names, key=lambda name: self.seconds[name] / (1 + kills[name])), at_import or self.fresh

    def within(self, tests: Sequence[str], seconds: float) -> list[str]:
        """The first of these tests, at least one of them, that take no more processor seconds together."""
        together = itertools.accumulate(map(self.seconds.__getitem__, tests))
        return [test for i, (test, spent) in enumerate(zip(tests, together, strict=True)) if not i or spent <= seconds]

    def _runs(self, test: Mapping[str, Any], lines: range) -> bool:
        return test["blind"] or not set(lines).isdisjoint(test["lines"].get(self.file, ()))


def record(module: Module, runner: Runner, folder: Path) -> Selection:
    """Record the tests of a module, or read what a folder holds of the same tests on the same package."""
    seen = runner.collect(module)
    recorded: dict[str, Mapping[str, Any]] = {}
    for file in module.tests:
        recorded |= _of_file(module, runner, folder, file, seen)
    return Selection(module.file, frozenset(seen["lines"].get(module.file, ())), seen["threads"] > 1, recorded)


def _of_file(module: Module, runner: Runner, folder: Path, file: str, seen: Mapping[str, Any]) -> dict[str, Any]:
    state = digest({*module.read(file), *module.package.rglob("*.py")})
    path = folder / f"{file.replace('/', '.')}.json"
    if path.exists() and (kept := json.loads(path.read_text()))["state"] == state:
        return kept["tests"]
    found, known = {}, dict.fromkeys(seen["tests"], 120.0)
    for name in seen["tests"]:
        if name.partition("::")[0] != file:
            continue
        result = runner.run(module.source, [name], known, fresh=seen["threads"] > 1, record=True)
        if result["outcome"] != "survived":
            raise NotRun(f"{name} passes alone before a mutant is planted, got {result['outcome']}:\n{result['log']}")
        found[name] = {key: result[key] for key in ("lines", "blind", "cpu_s")}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"state": state, "tests": found}))
    return found
