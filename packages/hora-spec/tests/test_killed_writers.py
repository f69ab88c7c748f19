"""Real processes: killed while they write, or writing at the same time, they leave whole adapters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

WORKER = Path(__file__).parent / "killed_writers.py"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are POSIX")


@pytest.mark.parametrize("what", ["kill_saves", "kill_exports", "race"])
def test_f3_writers_leave_whole_adapters_whatever_happens_to_them(tmp_path, what):
    rounds = 4 * settings.default.max_examples  # a hundred; two thousand under the profile nightly
    run = subprocess.run([sys.executable, WORKER, what, tmp_path, str(rounds)], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
