"""Commands of the serving guide run as they are written."""

import re
import shlex

import pytest
from hora_spec.__main__ import main

from .adapted import adapted, saved
from .table import PAGE
from .tiny import language_model, write_gguf

BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the guide begins with: a base, its GGUF file, and an adapter."""
    folder, model = tmp_path_factory.mktemp("guide"), language_model()
    model.save_pretrained(folder / "base")
    write_gguf(folder / "base.gguf", model)
    saved(adapted(model, "llama", "full"), folder / "adapter")
    return folder


def test_the_commands_of_the_guide_run_one_after_another(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "hora"
        assert main(arguments) == 0, f"{command}: {capsys.readouterr().err}"


def test_meta_the_guide_shows_every_command():
    assert {shlex.split(command)[1] for command in COMMANDS} == {
        "inspect",
        "verify",
        "export-lora",
        "export-gguf",
        "merge",
    }
