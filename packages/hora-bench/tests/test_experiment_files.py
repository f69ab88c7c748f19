"""The experiment files of the package are found by name, and a file of the caller's goes first."""

from pathlib import Path

import pytest
import typer
from hora_bench.experiments.files import SHIPPED, experiment_file


@pytest.mark.parametrize("text", ["control-digits", "control-digits.toml", "experiments/control-digits.toml"])
def test_a_name_is_a_file_of_the_package_wherever_one_is(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    assert experiment_file(text) == SHIPPED / "control-digits.toml"


def test_a_file_of_the_caller_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("control-digits.toml").touch()
    assert experiment_file("control-digits.toml") == Path("control-digits.toml")


@pytest.mark.parametrize("text", ["control", "elsewhere/control-digits.toml", ""])
def test_what_is_not_there_is_answered_with_what_is(text):
    with pytest.raises(typer.BadParameter, match=r"one of ablate-sign-digits, .*control-digits"):
        experiment_file(text)
