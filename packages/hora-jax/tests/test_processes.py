"""Two processes of two devices each, over loopback: they train, gather, merge and save one adapter."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hora_jax.processes import by_the_first, is_spread, on_host

SCRIPT = Path(__file__).with_name("one_of_two_processes.py")
TAKEN = ("address already in use", "Failed to bind", "Failed to add port")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_both(folder: Path) -> list[str]:
    """Logs of those that failed, the first one first; the other is ended then, which would wait for it."""
    command, env = [sys.executable, str(SCRIPT), str(free_port())], {**os.environ, "PYTHONUNBUFFERED": "1"}
    logs, running = [folder / f"{index}.log" for index in range(2)], {}
    for index, log in enumerate(logs):
        with open(log, "wb") as file:
            args = [*command, str(index), str(folder)]
            running[index] = subprocess.Popen(args, stdout=file, stderr=subprocess.STDOUT, env=env)
    failed, end = [], time.monotonic() + 300
    try:
        while running and not failed and time.monotonic() < end:
            time.sleep(0.1)
            done = {index: code for index, process in running.items() if (code := process.poll()) is not None}
            failed += [index for index, code in done.items() if code]
            running = {index: process for index, process in running.items() if index not in done}
        failed += running
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return [logs[index].read_text(errors="replace") for index in failed]


def test_two_processes_train_gather_merge_and_save_what_one_does(tmp_path):
    for attempt in range(3):  # another program may take a free port before they do
        folder = tmp_path / str(attempt)
        folder.mkdir()
        failed = run_both(folder)
        if not any(reason in log for log in failed for reason in TAKEN):
            break
    assert not failed, failed[0][-4000:]
    assert all("both agree" in (folder / f"{index}.log").read_text() for index in range(2))


def test_one_process_writes_and_gathers_without_the_others():
    value = jnp.arange(8.0)
    assert not is_spread(value)
    assert by_the_first(lambda: 3, {"phi": value}) == 3
    np.testing.assert_array_equal(on_host(value), np.arange(8.0))


def test_what_the_first_process_cannot_write_raises_its_own_error():
    def write():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        by_the_first(write, jax.numpy.ones(2))
