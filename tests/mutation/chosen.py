"""A plugin of pytest: tests of a job in its order, each within a limit of processor seconds, recorded where asked."""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import coverage
import pytest

PROCESSES = {"subprocess.Popen", "os.posix_spawn", "os.fork", "os.forkpty", "os.exec", "os.system"}
"""Audit events of a test whose lines are run by a process that is not recorded."""


class Chosen:
    """Runs what a job names, and what the job's record does not know, since the mutant made it."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self._failed: str | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Choose and order the tests; pytest runs them."""
        known, order = set(self.job["known"]), {name: at for at, name in enumerate(self.job["tests"])}
        items = [item for item in session.items if item.nodeid in order or item.nodeid not in known]
        session.items[:] = sorted(items, key=lambda item: order.get(item.nodeid, len(order)))
        if self.job.get("record"):
            self.start()
        return None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        """Let the process end when a test takes too long."""
        most = resource.getrlimit(resource.RLIMIT_CPU)[1]
        limit = time.process_time() + self.job["limits"].get(item.nodeid, self.job["limit_s"])
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, most))
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the name of the test that fails."""
        if report.failed:
            self._failed = report.nodeid

    def pytest_sessionfinish(self) -> None:
        """Write down what was seen."""
        seen = self.stop() if self.job.get("record") else {}
        Path(self.job["report"]).write_text(json.dumps({"by": self._failed} | seen))

    def start(self) -> None:
        """Record from here on."""
        self._blind = False
        self._start = _cpu_s()
        sys.addaudithook(self._audit)
        self._lines = coverage.Coverage(data_file=None, include=[f"{self.job['path']}/*"], config_file=False)
        self._lines.set_option("run:disable_warnings", ["no-data-collected"])  # of a test that runs nothing of ours
        self._lines.start()

    def stop(self) -> dict[str, Any]:
        """Lines of the package that were run, by file, whether others may have been, and processor seconds."""
        self._lines.stop()
        data = self._lines.get_data()
        path = self.job["path"]
        lines = {os.path.relpath(file, path): sorted(data.lines(file) or ()) for file in data.measured_files()}
        return {"lines": lines, "blind": self._blind or _compiled(), "cpu_s": round(_cpu_s() - self._start, 3)}

    def _audit(self, event: str, _: Any) -> None:
        self._blind = self._blind or event in PROCESSES


def _compiled() -> bool:
    """Whether torch has compiled a frame, which then runs without its lines being seen."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return bool(dynamo and dynamo.compilation_time_metrics)


def _cpu_s() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
