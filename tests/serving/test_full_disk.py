"""A disk without room is said, and leaves nothing that looks like a result."""

import contextlib

import pytest
from hora_spec.__main__ import main

from .guide import begin

resource = pytest.importorskip("resource", reason="limits of a process are a matter of POSIX")

COMMANDS = {
    "export-lora": ("export-lora", "adapter", "lora"),
    "export-gguf": ("export-gguf", "adapter", "adapter.gguf", "--base", "base.gguf"),
    "merge": ("merge", "adapter", "base", "merged"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    begin(folder)
    return folder


@contextlib.contextmanager
def room_for(size):
    """No file can grow beyond `size` bytes, as on a disk that has no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 1000, 5000])
@pytest.mark.parametrize("command", COMMANDS)
def test_e2_a_full_disk_is_said_and_leaves_nothing(command, size, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with room_for(size):
        assert main(COMMANDS[command]) == 2
    assert "error: " in capsys.readouterr().err
    left = {path.name for path in folder.iterdir()} - {"adapter", "base", "base.gguf"}
    assert left <= {"lora"}
    assert not any(path for path in folder.glob("lora/*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_e2_the_next_try_finds_room_and_works(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with room_for(1000):
        assert main(COMMANDS[command]) == 2
    assert main(COMMANDS[command]) == 0
    export, *base = {"merge": ("merged", "--base", "base")}.get(command, (COMMANDS[command][2],))
    assert main(("verify", "adapter", export, *base)) == 0
