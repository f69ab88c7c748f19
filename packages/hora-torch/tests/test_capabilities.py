"""What the page of capabilities says is what happens, and every no has a reason."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDER = Path(__file__).parents[1] / "capabilities"
in_repository = pytest.mark.skipif(not (ROOT / "noxfile.py").exists(), reason="the page is in the repository")


@pytest.fixture(scope="module")
def judge():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("judge")
    sys.path.pop(0)


@pytest.fixture(scope="module")
def answers(judge):
    return judge.judge(judge.LORA), judge.judge(judge.HORA)


@in_repository
def test_the_page_says_what_happens(judge, answers):
    page = (ROOT / "docs/guide/capabilities.md").read_text()
    assert page == judge.page(*answers), "nox -s capabilities writes it anew"


def test_every_no_of_hora_has_a_reason_and_no_reason_is_left_over(judge, answers):
    assert {name for name, answer in answers[1].items() if not answer} == judge.REASONS.keys()


def test_what_raises_refuses_and_does_not_fail(judge, answers):
    kinds = {error.partition(":")[0] for (method, _), error in judge.REFUSALS.items() if method == "HoRA"}
    assert kinds <= {"HoraError", "UnknownArgumentError", "ValueError"}


def test_meta_the_judge_says_no_to_a_method_that_does_nothing(judge):
    idle = judge.Method("idle", judge.HORA.config_class, judge.HORA.not_idle | {"init_weights": True})
    assert not judge.QUESTIONS["target: Linear"](idle)
    assert not judge.QUESTIONS["several adapters"](idle)
    assert not judge.QUESTIONS["one adapter per sample of a batch"](idle)
