"""Every mutant of the conformance kit, planted in torch and in JAX, is caught by what this session runs."""

import subprocess
import sys

import pytest
from hora_spec.testing.mutants import MUTANTS, Mutant, killer

from .report import ROOT
from .test_numbers import FRAMEWORKS, session_cases

by_name = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


@by_name
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_mutant_is_caught(framework, mutant: Mutant, backends, tally):
    cases = session_cases(mutant.check, mutant.dtype)
    assert cases, f"this session never runs {mutant.check.__name__} in {mutant.dtype}"
    assert killer(mutant, backends[framework], cases), f"{mutant.name} survives in {framework}"
    tally.add("mutants", framework, {mutant.rule})


@pytest.mark.parametrize(
    ("plant", "tests"),
    [
        ("torch:Variance of a sample, ddof 1", "test_g1 and float32 and relu-1.0-equal"),
        ("jax:The delta is added twice", "test_m1 and float32"),
    ],
)
def test_a_planted_session_fails(plant, tests, tmp_path):
    """What ``nox -s parity -- --plant torch:...`` shows by hand, on the tests that must notice."""
    command = (sys.executable, "-m", "pytest", "tests/parity/test_numbers.py", "-q", "-x", "-n0", "-k", tests)
    ended = subprocess.run((*command, "--plant", plant), cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == pytest.ExitCode.TESTS_FAILED, ended.stdout
    assert plant.partition(":")[2] in ended.stdout
