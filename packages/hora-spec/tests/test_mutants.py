"""Tests of the tests: every deliberate mistake is caught, and nothing honest is."""

import time

import pytest
from hora_spec import HoraError
from hora_spec.testing import LAWS, REFERENCE, VECTORIZED, check_delta, check_factors, check_merge_refuses, corpus
from hora_spec.testing.mutants import MUTANTS, killer, rewired, survivors
from hora_spec.testing.mutants.__main__ import main

BUDGET_S = 60


@pytest.mark.parametrize("backend", [REFERENCE, VECTORIZED], ids=lambda backend: backend.name)
def test_every_mutant_is_killed(backend):
    start = time.perf_counter()
    alive = [f"{mutant.name} (spec {mutant.rule})" for mutant in survivors(backend)]
    print(f"\n{len(MUTANTS) - len(alive)} of {len(MUTANTS)} mutants killed in {time.perf_counter() - start:.1f} s")
    assert not alive
    assert len(MUTANTS) >= 20
    assert time.perf_counter() - start < BUDGET_S


def test_mutants_have_names_of_their_own():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("backend", [REFERENCE, VECTORIZED], ids=lambda backend: backend.name)
def test_rewiring_alone_is_honest(backend, dtype):
    for case in corpus():
        for check in (check_factors, check_delta):
            assert check(rewired(backend), case, dtype) <= 1


@pytest.mark.parametrize(
    ("rule", "law"),
    [("G1", "law_scale_and_shift"), ("G2", "law_permutation"), ("G7", "law_finite_differences"), ("I4", "law_start")],
)
def test_laws_catch_mutants_without_the_reference(rule, law):
    check = next(check for check in LAWS if check.__name__ == law)
    caught = [m.name for m in MUTANTS if m.rule == rule and _fails(check, m.plant(REFERENCE))]
    assert caught, f"{law} catches no mutant of rule {rule}"


def test_no_cases_prove_nothing():
    with pytest.raises(HoraError, match="at least one case"):
        killer(MUTANTS[0], REFERENCE, ())


def _fails(check, backend):
    for case in corpus():
        try:
            check(backend, case, "float64")
        except AssertionError:
            return True
    return False


def test_e2_a_refusal_that_changes_the_weight_is_seen():
    def merge(weight, delta, layout):
        weight[0, 0] += 1
        return REFERENCE.merge(weight, delta, layout)

    with pytest.raises(AssertionError, match="after a refusal"):
        check_merge_refuses(REFERENCE._replace(merge=merge), corpus()[0], "float32")


def test_the_report_counts_them(capsys):
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert f"vectorized: {len(MUTANTS)} of {len(MUTANTS)} mutants killed" in capsys.readouterr().out
