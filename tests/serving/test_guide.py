"""Commands of the serving guide run as they are written."""

import re
import shlex

import pytest
from hora_spec.__main__ import main

from .guide import begin, blocks, own_commands
from .table import PAGE, SERVERS

CHECKS = PAGE.parents[2] / "packages/hora-torch/integrations"
INTEGRATIONS = {"diffusers": ("py", "check_diffusers.py"), "lm-eval": ("console", "check_lm_eval.py")}
"""What `nox -s integrations` runs: kind, and where."""

OF_THE_READER = {"unet", "lora", "base", "adapter", "TASK", "python", "-m"}
"""Words that stand for something of the reader's, or for the Python that runs the check."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the guide begins with: a base, its GGUF file, and an adapter."""
    folder = tmp_path_factory.mktemp("guide")
    begin(folder)
    return folder


def test_the_commands_of_the_guide_run_one_after_another(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for command in own_commands():
        program, *arguments = shlex.split(command)
        assert program == "hora"
        assert main(arguments) == 0, f"{command}: {capsys.readouterr().err}"


def test_meta_the_guide_shows_every_command():
    assert {shlex.split(command)[1] for command in own_commands()} == {
        "inspect",
        "verify",
        "export-lora",
        "export-gguf",
        "merge",
    }


def test_whatever_the_guide_shows_is_run_somewhere():
    shown = {}
    for block in blocks():
        if block.kind != "sh":
            shown.setdefault(block.heading, set()).add(block.kind)
    elsewhere = {heading: {kind} for heading, (kind, _) in INTEGRATIONS.items()}
    assert shown == {heading: set(kinds) for heading, kinds in SERVERS.items()} | elsewhere


@pytest.mark.parametrize("heading", INTEGRATIONS)
def test_what_the_integrations_run_has_the_words_of_the_guide(heading):
    (block,) = (block for block in blocks() if block.heading == heading)
    words = set(re.findall(r"[\w-]+", block.text)) - OF_THE_READER
    check = (CHECKS / INTEGRATIONS[heading][1]).read_text()
    assert words
    assert not [word for word in words if word not in check]
