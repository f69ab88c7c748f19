"""A process that has imported the frameworks once and forks a test run for each mutant.

Reads one job for each line of standard input and answers each with a line. ``collect`` makes a second process that has
collected tests as well. Nothing of the mutated package is imported before the first process forks, so that a child
finds it under ``path``; a child of the second swaps functions (`swap`), or ends with ``AFRESH`` where an import would
do more than that.
"""

import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from typing import Any, TextIO

import pytest
from chosen import Chosen
from swap import Swap

PYTEST = (
    "-x",
    "-q",
    "-s",
    "--assert=plain",
    "--no-header",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:xdist",
    "-p",
    "no:randomly",
)
CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV)
NOTICED = (1, 2, 4, *(-crash for crash in CRASHES))
OUTCOMES = {0: "survived", -signal.SIGXCPU: "timeout"} | dict.fromkeys(NOTICED, "killed")
AFRESH = 70
"""Exit code of a child that cannot plant a mutant by swapping functions."""
Job = dict[str, Any]


def main() -> None:
    """Import what is named, then serve until the input ends."""
    package, *imports = sys.argv[1:]
    kept = [importlib.import_module(name) for name in imports]  # pytest forgets a conftest that it imports anew
    if package in sys.modules:
        raise SystemExit(f"{package} is not imported before a mutant is in place, got one of {imports} that imports it")
    warnings.filterwarnings("ignore", message=".*fork", category=RuntimeWarning)  # JAX has no threads yet
    warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
    gc.freeze()  # pytest collects garbage at its end, half a second each time with these imports
    collected = None
    _say(sys.stdout, "ready")
    for line in sys.stdin:
        job = json.loads(line)
        if job["do"] == "collect":
            collected = Collected(job)
            _say(sys.stdout, collected.answer())
        elif job["fresh"]:
            answer = _attend(job)
            if answer is None:
                _test(job, Chosen(job))
            _say(sys.stdout, answer)
        else:
            assert collected is not None
            _say(sys.stdout, collected.answer(line))
    del kept


class Collected:
    """The second process, seen from the first."""

    def __init__(self, job: Job) -> None:
        (jobs, send), (receive, answers) = os.pipe(), os.pipe()
        if not os.fork():
            os.close(send)
            os.close(receive)
            _test(job, Serving(job, os.fdopen(jobs), os.fdopen(answers, "w")))
        os.close(jobs)
        os.close(answers)
        self._send, self._receive = os.fdopen(send, "w"), os.fdopen(receive)

    def answer(self, line: str = "") -> Any:
        """What it says to a job, or first of all."""
        if line:
            self._send.write(line)
            self._send.flush()
        said = self._receive.readline()
        return json.loads(said) if said else {"outcome": "broken"}


class Serving(Chosen):
    """A plugin that serves jobs when pytest has collected; what runs tests is a child for each."""

    def __init__(self, job: Job, jobs: TextIO, answers: TextIO) -> None:
        super().__init__(job | {"record": True})
        self._jobs, self._answers = jobs, answers
        self.start()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Answer until the input ends; return to pytest's own loop in the children."""
        seen = self.stop()
        if session.testsfailed:
            return None  # pytest says what could not be collected
        tests, threads = [item.nodeid for item in session.items], len(os.listdir("/proc/self/task"))
        _say(self._answers, {"tests": tests, "threads": threads, "lines": seen["lines"]})
        swap = Swap(self.job["path"])
        gc.freeze()
        for line in self._jobs:
            job = json.loads(line)
            answer = _attend(job)
            if answer is None:
                _redirect(job["log"])
                if not swap(job["file"]):
                    os._exit(AFRESH)
                self.job = job
                return super().pytest_runtestloop(session)
            _say(self._answers, answer)
        os._exit(0)


def _attend(job: Job) -> dict[str, Any] | None:
    """Outcome of a child, which gets None and does the job; it is killed with all its children when it hangs."""
    start = time.monotonic()
    child = os.fork()
    if not child:
        os.setsid()
        return None
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() - start > job["hangs_s"]:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"outcome": "timeout", "code": None, "cpu_s": 0.0}
        time.sleep(0.01)
    code = os.waitstatus_to_exitcode(ended[1])
    return {"outcome": "afresh" if code == AFRESH else OUTCOMES.get(code, "broken"), "code": code}


def _test(job: Job, plugin: Chosen) -> None:
    """Run pytest and end, whatever happens."""
    code = 3
    try:
        _redirect(job["log"])
        sys.path.insert(0, job["path"])
        os.environ["PYTHONPATH"] = os.pathsep.join([job["path"], os.environ.get("PYTHONPATH", "")])
        sys.dont_write_bytecode = True
        warnings.resetwarnings()
        options = [f"--rootdir={job['root']}", f"--basetemp={job['path']}/tmp"]
        code = int(pytest.main([*PYTEST, *options, *job["files"]], plugins=[plugin]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _redirect(path: str) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _say(where: TextIO, what: Any) -> None:
    print(json.dumps(what), file=where, flush=True)


if __name__ == "__main__":
    main()
