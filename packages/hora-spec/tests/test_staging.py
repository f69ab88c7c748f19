"""New files and directories appear whole or not at all, whatever happens to their writer."""

import os
import signal
import subprocess
import sys
import time

import pytest
from hora_spec import HoraError
from hora_spec.staging import new_directory, new_file

POSIX = pytest.mark.skipif(os.name != "posix", reason="SIGKILL and flock are POSIX")


def write(maker, target, text="new", then=lambda: None):
    with maker(target) as path:
        (path / "part" if maker is new_directory else path).write_text(text)
        then()


def content(target):
    return (target / "part" if target.is_dir() else target).read_text()


HOLD = """
import sys, time
from pathlib import Path
from hora_spec import staging

target = Path(sys.argv[2])
with getattr(staging, sys.argv[1])(target) as path:
    (path / "part" if sys.argv[1] == "new_directory" else path).write_text("half")
    (target.parent / "ready").touch()
    time.sleep(float(sys.argv[3]))
"""


def start(maker, target, seconds):
    """A process that has begun to write."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, maker.__name__, str(target), str(seconds)])
    while not (target.parent / "ready").exists():
        assert process.poll() is None
        time.sleep(0.001)
    (target.parent / "ready").unlink()
    return process


@pytest.mark.parametrize("maker", [new_directory, new_file])
class TestWhole:
    def test_f3_what_was_written_is_there_and_nothing_else(self, maker, tmp_path):
        write(maker, tmp_path / "new" / "out")
        assert content(tmp_path / "new" / "out") == "new"
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]

    def test_f3_a_writer_that_fails_leaves_nothing(self, maker, tmp_path):
        def fail():
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            write(maker, tmp_path / "out", then=fail)
        assert list(tmp_path.iterdir()) == []

    def test_f3_what_is_there_is_kept(self, maker, tmp_path):
        write(maker, tmp_path / "out", "old")
        with pytest.raises(HoraError, match="is there: choose a new path"):
            write(maker, tmp_path / "out")
        assert content(tmp_path / "out") == "old"

    def test_f3_what_appears_meanwhile_is_kept(self, maker, tmp_path):
        with pytest.raises(HoraError, match="is there: choose a new path"):
            write(maker, tmp_path / "out", then=lambda: (tmp_path / "out" / "other").mkdir(parents=True))
        assert [path.name for path in tmp_path.rglob("*")] == ["out", "other"]

    def test_f3_a_broken_link_is_kept(self, maker, tmp_path):
        (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(HoraError, match="is there"):
            write(maker, tmp_path / "out")
        assert not (tmp_path / "elsewhere").exists()

    @POSIX
    def test_f3_what_a_killed_writer_left_is_taken_over(self, maker, tmp_path):
        process = start(maker, tmp_path / "out", 60)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
        write(maker, tmp_path / "out")
        assert content(tmp_path / "out") == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @POSIX
    def test_f3_two_writers_of_one_path_do_not_mix(self, maker, tmp_path):
        process = start(maker, tmp_path / "out", 0.3)
        with pytest.raises(HoraError, match="one process writes a path at a time"):
            write(maker, tmp_path / "out")
        assert process.wait() == 0
        assert content(tmp_path / "out") == "half"


def test_f3_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    write(new_directory, tmp_path / "out")
    assert content(tmp_path / "out") == "new"
