"""A process that has imported the frameworks once and forks a test run for each mutant: ``python warm.py MODULE ...``.

Reads one job for each line of standard input, ``{"path", "tests", "limit_s", "log"}``, and answers each with a line
``{"outcome", "time_s"}``. Nothing of ours is imported before a fork, so a child finds the packages under ``path``.
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
from typing import Any

PYTEST = ("-x", "-q", "--assert=plain", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly")
OK, FAILED = 0, 1  # exit codes of pytest; others mean that it could not run the tests, as when an import fails


def main() -> None:
    """Import what is named, then serve until the input ends."""
    kept = [importlib.import_module(name) for name in sys.argv[1:]]  # pytest forgets a conftest that it imports anew
    ours = [name for name in sys.modules if name.partition(".")[0] in ("hora_spec", "hora_torch", "hora_jax")]
    if ours:
        raise SystemExit(f"nothing of ours is imported before a mutant is in place, got {ours[:3]}")
    warnings.filterwarnings("ignore", message=".*fork", category=RuntimeWarning)  # JAX has no threads yet
    warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
    gc.freeze()  # pytest collects garbage at its end, half a second each time with these imports
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
    del kept


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Outcome of one test run in a child of its own, killed with all its children when it takes too long."""
    start = time.monotonic()
    child = os.fork()
    if not child:
        _test(job)
    ended = _wait(child, start + job["limit_s"])
    outcome = "timeout" if ended is None else "survived" if ended == OK else "killed"
    return {"outcome": outcome, "code": ended, "time_s": round(time.monotonic() - start, 2)}


def _wait(child: int, deadline: float) -> int | None:
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _test(job: dict[str, Any]) -> None:
    """Run pytest and end, whatever happens."""
    code = 3
    try:
        os.setsid()
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.path.insert(0, job["path"])
        os.environ["PYTHONPATH"] = os.pathsep.join([job["path"], os.environ.get("PYTHONPATH", "")])
        sys.dont_write_bytecode = True
        warnings.resetwarnings()
        import pytest

        code = int(pytest.main([*PYTEST, *job["tests"]]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
