"""A warm process with a copy of one package, in which mutants are planted."""

import compileall
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from modules import HERE, Module

SPARE_S = 5
"""Processor seconds that a test may take on a mutant beyond five times what it takes."""


class NotRun(Exception):
    """Tests could not be run, which says nothing of a mutant."""


class Runner:
    """Runs tests of a module on any code of it."""

    def __init__(self, module: Module) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mutation-")
        self._path = Path(self._folder.name)
        command = [sys.executable, str(HERE / "warm.py"), module.package.name, "conftest", *module.imports]
        path = os.pathsep.join(
            [str(module.root), os.environ.get("PYTHONPATH", "")]
        )  # its conftest prepares torchvision
        environment = os.environ | {"PYTHONPATH": path}
        self._process = subprocess.Popen(
            command, cwd=module.root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def collect(self, module: Module) -> dict[str, Any]:
        """Names of a module's tests, lines that are run at import, and how many threads were started then."""
        self._module = module
        copy = self._path / module.package.name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(module.package, copy, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(copy, quiet=1)
        for kept in (copy / "__pycache__").glob(f"{Path(module.file).stem}.*"):
            kept.unlink()  # of a mutant's size and second, it would be taken for the mutant
        return self._ask("collect", module.tests, ())

    def run(
        self,
        code: str,
        tests: Sequence[str],
        seconds: dict[str, float],
        *,
        fresh: bool,
        record: bool = False,
    ) -> dict[str, Any]:
        """Outcome of tests on the module with this code, in an import of its own or where it is imported already.

        ``seconds`` is how long each known test takes; those that are not known run, too.
        """
        (self._path / self._module.file).write_text(code)
        report = self._path / "report"
        report.unlink(missing_ok=True)
        job = {
            "fresh": fresh,
            "record": record,
            "known": [*seconds],
            "limits": {name: SPARE_S + 5 * seconds[name] for name in tests if name in seconds},
            "hangs_s": 120 + 20 * sum(seconds.get(name, 30) for name in tests),
        }
        answer = self._ask("run", dict.fromkeys(name.partition("::")[0] for name in tests), tests, **job)
        return answer | (json.loads(report.read_text()) if report.exists() else {})

    def close(self) -> None:
        """End the process and remove the copy."""
        self._process.communicate()
        self._folder.cleanup()

    def _ask(self, do: str, files: Iterable[str], tests: Sequence[str], **others: Any) -> dict[str, Any]:
        log = self._path / "log"
        job = {
            "do": do,
            "path": str(self._path),
            "root": str(self._module.root),
            "file": self._module.file,
            "files": [*files],
            "tests": [*tests],
            "limit_s": 600,
            "log": str(log),
            "report": str(self._path / "report"),
        }
        assert self._process.stdin is not None
        print(json.dumps(job | others), file=self._process.stdin, flush=True)
        answer = self._answer()
        said = log.read_text(errors="replace")[-2000:] if log.exists() else ""
        if answer.get("outcome") == "broken":
            raise NotRun(f"tests could not be run ({answer.get('code')}):\n{said}")
        return answer | {"log": said}

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise NotRun(f"{' '.join(map(str, self._process.args))} ended: run it by hand")
        return json.loads(line)
