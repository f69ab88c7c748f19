"""`run`, the start on a fresh machine: what it says where something is missing, and which torch it chooses."""

import os
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

RUN = Path(__file__).parent.parent / "run"


@pytest.fixture
def start(tmp_path):
    """The script as a module, of a repository in a folder whose name has a space."""
    repository = tmp_path / "a repository"
    repository.mkdir()
    (repository / "run").write_bytes(RUN.read_bytes())
    (repository / "constraints.txt").write_text("numpy==2.0\ntorch==2.13.0\n")
    loader = SourceFileLoader("hora_start", str(repository / "run"))
    module = module_from_spec(spec_from_loader("hora_start", loader))
    loader.exec_module(module)
    module.NOX.mkdir()
    return module


def chosen(start) -> str:
    return (start.NOX / f"torch-{start.VERSION}.txt").read_text().strip()


def test_only_the_standard_library_is_imported():
    done = subprocess.run([sys.executable, "-I", "-S", str(RUN), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "python3 run demo" in done.stdout


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], []),
        (["demo"], ["-s", "demo"]),
        (["--cpu", "parity", "docs"], ["-s", "parity", "docs"]),
        (["tests", "--", "-k", "merge", "--cpu"], ["-s", "tests", "--", "-k", "merge", "--cpu"]),
        (["--list"], ["--list"]),
        (["--", "-k", "merge"], ["--", "-k", "merge"]),
    ],
)
def test_arguments_reach_nox(start, given, expected):
    assert start.for_nox(given) == expected


def test_an_old_python_is_named(start, monkeypatch, capsys):
    monkeypatch.setattr(start, "OLDEST", (99, 0))
    assert start.main([]) == 2
    assert "HoRA needs Python 99.0 or newer" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_missing_part_of_python_is_answered_with_a_command(start, monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert start.main([]) == 2
    assert f"lacks {module}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ("ID=debian\n", "apt-get install python3-venv"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\n', "apt-get install python3-venv"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "dnf install python3-pip"),
        ("ID=unheard-of\n", "packages of your system"),
    ],
)
def test_the_command_is_the_distributions_own(start, tmp_path, release, command):
    (tmp_path / "os-release").write_text(release)
    assert command in start.how_to_install(tmp_path / "os-release")


def test_a_repository_that_cannot_be_written_is_said(start, monkeypatch, capsys):
    monkeypatch.setattr(start, "NOX", RUN / "below-a-file")
    assert start.main(["demo"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_both_builds_at_once_are_refused(start, capsys):
    assert start.main(["--cpu", "--cuda"]) == 2
    assert "not both" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one build")
class TestTorch:
    @pytest.fixture(autouse=True)
    def offers(self, start, monkeypatch):
        self.builds = {"torch==2.13.0", "torch==2.13.0+cpu"}
        monkeypatch.setattr(start, "offered", lambda python: self.builds)
        monkeypatch.setattr(start, "has_nvidia_driver", lambda: False)

    def test_without_a_driver_it_is_the_cpu_build(self, start):
        start.choose_torch("python", None)
        assert chosen(start) == "torch==2.13.0+cpu"

    def test_with_a_driver_it_is_what_pip_takes(self, start, monkeypatch):
        monkeypatch.setattr(start, "has_nvidia_driver", lambda: True)
        start.choose_torch("python", None)
        assert chosen(start).startswith("#")

    def test_a_choice_holds_until_another_is_asked_for(self, start):
        start.choose_torch("python", "--cuda")
        start.choose_torch("python", None)
        assert chosen(start).startswith("#")
        start.choose_torch("python", "--cpu")
        assert chosen(start) == "torch==2.13.0+cpu"

    def test_a_choice_follows_the_release_that_is_pinned(self, start):
        start.choose_torch("python", None)
        start.CONSTRAINTS.write_text("torch==2.14.0\n")
        self.builds.add("torch==2.14.0+cpu")
        start.choose_torch("python", None)
        assert chosen(start) == "torch==2.14.0+cpu"

    def test_a_cpu_build_that_nobody_offers_is_an_error_where_it_was_asked_for(self, start, capsys):
        self.builds = {"torch==2.13.0"}
        with pytest.raises(SystemExit):
            start.choose_torch("python", "--cpu")
        assert "PIP_EXTRA_INDEX_URL" in capsys.readouterr().err
        assert not list(start.NOX.glob("torch-*"))

    def test_and_else_said_before_gigabytes_are_taken(self, start, capsys):
        self.builds = {"torch==2.13.0"}
        start.choose_torch("python", None)
        assert "6 GB" in capsys.readouterr().out
        assert chosen(start).startswith("#")


def test_pip_is_asked_for_local_builds_too(start, monkeypatch):
    answer = "torch (2.13.0)\nAvailable versions: 2.13.0, 2.13.0+cpu, 2.12.0\n  INSTALLED: none\n"
    asked = []
    monkeypatch.setattr(
        start, "pip", lambda *given, **_: asked.append(given) or subprocess.CompletedProcess(given, 0, stdout=answer)
    )
    assert start.offered("python") == {"torch==2.13.0", "torch==2.13.0+cpu", "torch==2.12.0"}


def test_an_environment_is_made_once_and_again_where_it_was_torn(start, monkeypatch):
    made = []
    monkeypatch.setattr(start.subprocess, "run", lambda command, **_: made.append(command))
    python = start.NOX / f"start-{start.VERSION}" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    python.parent.mkdir(parents=True)
    python.touch()

    start.start_environment()
    assert [command[2] for command in made] == ["venv", "pip"]
    start.start_environment()
    assert len(made) == 2
    start.CONSTRAINTS.write_text("torch==2.14.0\n")
    start.start_environment()
    assert len(made) == 4


def test_an_environment_that_was_copied_with_the_repository_is_made_again(start, monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(start.subprocess, "run", lambda command, **_: made.append(command))
    folder = start.NOX / f"start-{start.VERSION}"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").touch()
    start.start_environment()
    shutil.copytree(start.NOX, tmp_path / "copied/.nox")
    monkeypatch.setattr(start, "NOX", tmp_path / "copied/.nox")
    monkeypatch.setattr(start, "ROOT", tmp_path / "copied")
    start.start_environment()
    assert len(made) == 4


def test_a_failed_installation_leaves_no_stamp_and_says_what_failed(start, monkeypatch, capsys):
    def fail(command, **_):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(start.subprocess, "run", fail)
    assert start.main([]) == 2
    assert "is there a network" in capsys.readouterr().err
    assert not list(start.NOX.glob("start-*/installed.sha256"))


def test_nox_is_handed_the_sessions(start, monkeypatch):
    handed = []
    monkeypatch.setattr(start, "start_environment", lambda: "python")
    monkeypatch.setattr(start, "choose_torch", lambda *_: None)
    monkeypatch.setattr(start.subprocess, "call", lambda command: handed.append(command) or 3)
    assert start.main(["demo", "--", "--quick"]) == 3
    assert handed[0][-4:] == ["-s", "demo", "--", "--quick"]
