"""Mutation testing: change one thing in a module, and see whether its tests notice.

    python tests/mutation/run.py [MODULE ...] [--workers N] [--list]

MODULE is a pattern such as ``hora_torch.linear`` or ``hora_jax.*``; by default all modules of ``modules.toml``. What
survives must stand in ``survivors.toml`` with a reason, and what stands there must survive. A run that was stopped goes
on where it was: results lie in ``results/mutation/``, and hold as long as the module does; those of survivors as long
as its tests do, too. Needs `os.fork`.
"""

import argparse
import fnmatch
import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutants import Mutant, mutants

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "results" / "mutation"


@dataclass(frozen=True)
class Module:
    """A module to be mutated, and what its tests are."""

    name: str
    tests: tuple[str, ...]
    imports: tuple[str, ...]

    @property
    def package(self) -> Path:
        """Folder of the package."""
        own = self.name.partition(".")[0]
        return ROOT / "packages" / own.replace("_", "-") / "src" / own

    @property
    def file(self) -> str:
        """Path of the module inside of its package."""
        return self.name.partition(".")[2].replace(".", "/") + ".py"

    @property
    def source(self) -> str:
        """The module as it is."""
        return (self.package / self.file).read_text()

    def digests(self) -> dict[str, str]:
        """What results depend on: the module, and its tests with what is no test beside them."""
        tests = [ROOT / test for test in self.tests]
        beside = {file for test in tests for file in test.parent.glob("*.py")}
        shared = [file for file in beside if not file.name.startswith("test_")]
        text = b"".join(file.read_bytes() for file in sorted({*tests, *shared}))
        return {"source": _digest(self.source.encode()), "tests": _digest(text)}


class Runner:
    """A warm process with a copy of one package, in which it plants mutants."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._folder = tempfile.TemporaryDirectory(prefix="mutation-")
        self._copy = Path(self._folder.name) / module.package.name
        shutil.copytree(module.package, self._copy, ignore=shutil.ignore_patterns("__pycache__"))
        command = [sys.executable, str(HERE / "warm.py"), "conftest", *module.imports]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # its conftest prepares torchvision
        environment = os.environ | {"PYTHONPATH": path}
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def run(self, code: str, limit_s: float) -> dict[str, Any]:
        """Outcome of the module's tests on the module with this code."""
        (self._copy / self._module.file).write_text(code)
        log = Path(self._folder.name) / "log"
        job = {"path": self._folder.name, "tests": self._module.tests, "limit_s": limit_s, "log": str(log)}
        assert self._process.stdin is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return self._answer() | {"log": log.read_text(errors="replace")[-2000:]}

    def close(self) -> None:
        """End the process and remove the copy."""
        self._process.communicate()
        self._folder.cleanup()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self._process.args))} ended: run it by hand")
        return json.loads(line)


def main() -> None:
    """Entry point; exits with 1 if a survivor is not on the list, or what is listed does not survive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=["*"], metavar="MODULE")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    options = parser.parse_args()
    chosen = [m for m in modules() if any(fnmatch.fnmatch(m.name, pattern) for pattern in options.modules)]
    if not chosen:
        raise SystemExit(f"a module is one of {', '.join(m.name for m in modules())}, got {options.modules}")
    if options.list:
        print("\n".join(f"{m.name} {mutant.name}" for m in chosen for mutant in mutants(m.source)))
        return
    listed = tomllib.loads((HERE / "survivors.toml").read_text())
    problems = [line for m in chosen for line in check(m, listed.get(m.name, []), options.workers)]
    print("\n".join(problems))
    raise SystemExit(bool(problems))


def modules() -> Iterator[Module]:
    """Every module of ``modules.toml``."""
    for name, package in tomllib.loads((HERE / "modules.toml").read_text())["packages"].items():
        for own, tests in package["modules"].items():
            paths = tuple(f"{package['tests']}/{test}" for test in tests)
            yield Module(f"{name}.{own}", paths, tuple(package["import"]))


def check(module: Module, listed: Sequence[Mapping[str, str]], workers: int) -> list[str]:
    """Run the mutants of a module; what is wrong with the list of survivors."""
    start = time.monotonic()
    every = list(mutants(module.source))
    results = run(module, every, workers)
    counts = Counter(result["outcome"] for result in results.values())
    total = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("killed", "timeout", "survived"))
    print(f"{module.name}: {len(every)} mutants, {total}, {time.monotonic() - start:.0f} s", flush=True)
    alive = {name for name, result in results.items() if result["outcome"] == "survived"}
    caught = {name for name, result in results.items() if result["outcome"] == "killed"}
    names = {entry["mutant"] for entry in listed if entry["why"]}
    return [
        *(f"{module.name} survived, kill it or list it: {name}" for name in sorted(alive - names)),
        *(f"{module.name} is listed and caught: {name}" for name in sorted(names & caught)),
        *(f"{module.name} is listed and no mutant: {name}" for name in sorted(names - results.keys())),
    ]


def run(module: Module, every: Sequence[Mutant], workers: int) -> dict[str, dict[str, Any]]:
    """Result of each mutant by name: those that still hold, and the others anew."""
    path = RESULTS / f"{module.name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    digests = module.digests()
    names = {mutant.name for mutant in every}
    results = {name: result for name, result in _stored(path, digests).items() if name in names}
    left = [mutant for mutant in every if mutant.name not in results]
    if not left:
        return results
    runners: queue.Queue[Runner] = queue.Queue()
    for _ in range(min(workers, len(left))):
        runners.put(Runner(module))
    limit_s = _limit(module, runners)

    def one(mutant: Mutant) -> tuple[str, dict[str, Any]]:
        runner = runners.get()
        try:
            return mutant.name, runner.run(mutant.code, limit_s)
        finally:
            runners.put(runner)

    with path.open("a") as file, ThreadPoolExecutor(runners.qsize()) as pool:
        for name, result in pool.map(one, left):
            if module.digests() != digests:
                raise SystemExit(
                    f"{module.name} and its tests stay as they are while they run, got a change: run again"
                )
            results[name] = result
            print(json.dumps({"mutant": name, **result, **digests}), file=file, flush=True)
    while not runners.empty():
        runners.get().close()
    return results


def _limit(module: Module, runners: "queue.Queue[Runner]") -> float:
    """Time limit of a mutant, from a run of the tests on the module as it is, which must pass."""
    runner = runners.get()
    honest = runner.run(module.source, 1800)
    runners.put(runner)
    if honest["outcome"] != "survived":
        raise SystemExit(f"the tests of {module.name} pass before it is mutated, got:\n{honest['log']}")
    return 20 + 4 * honest["time_s"]


def _stored(path: Path, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    results = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        result = json.loads(line)
        same = [result[key] == digests[key] for key in ("source", "tests")]
        if all(same) or (same[0] and result["outcome"] == "killed"):
            results[result["mutant"]] = result
    return results


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


if __name__ == "__main__":
    main()
