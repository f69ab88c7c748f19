"""The examples run, and train."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def test_there_are_examples():
    assert [path.stem for path in EXAMPLES] == ["train_nnx", "train_pytree"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert len(path.read_text().splitlines()) <= 30
    monkeypatch.chdir(tmp_path)
    losses = runpy.run_path(str(path))["losses"]
    assert losses[-1] < 0.8 * losses[0]
