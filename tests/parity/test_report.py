"""The report says what was compared, and says so when that is no proof."""

from dataclasses import asdict

import pytest

from .report import ANY, FAMILIES, Line, Report, Tally, replay, rules_of_spec


def line(rule: str = "G1", family: str = "factors", backend: str = "torch", cases: int = 1, worst: float = 0.5) -> Line:
    return Line(rule, family, backend, cases, worst, f"test_{rule}")


def report(*lines: Line) -> Report:
    result = Report()
    result.fold(map(asdict, lines))
    return result


def complete() -> list[Line]:
    rules = [line(rule=rule) for rule in rules_of_spec()]
    return rules + [line(rule=ANY, family=name) for name, family in FAMILIES.items() if not family.exact]


def exact() -> list[Line]:
    return [line(rule=ANY, family=name, worst=0.0) for name, family in FAMILIES.items() if family.exact]


def test_a_session_that_covers_everything_has_no_problems():
    assert not report(*complete(), *exact()).problems()


def test_a_failed_test_is_a_problem():
    failed = report(*complete(), *exact())
    failed.failures.append("tests/parity/test_numbers.py::test_g1")
    assert failed.problems() == ["tests/parity/test_numbers.py::test_g1 failed"]


def test_a_rule_without_cases_is_a_problem():
    lines = [each for each in complete() if each.rule != "M2"]
    assert report(*lines, *exact()).problems() == ["rule M2 has no cases"]


def test_a_family_without_cases_is_a_problem():
    lines = [each for each in complete() if each.family != "gradients"]
    assert report(*lines, *exact()).problems() == ["family 'gradients' has no cases"]


@pytest.mark.parametrize("worst", [1.5, float("inf"), float("nan")])
def test_an_exceeded_bound_is_a_problem(worst):
    (problem,) = report(*complete(), *exact(), line(backend="jax", worst=worst)).problems()
    assert "exceeds its bound" in problem


def test_a_bound_that_nothing_approaches_is_a_problem():
    lines = [each for each in complete() if each.family != "linear"]
    (problem,) = report(*lines, *exact(), line(family="linear", worst=0.001)).problems()
    assert "never approaches its bound" in problem


def test_folding_counts_cases_and_keeps_the_worst():
    found = report(line(cases=2, worst=0.1), line(cases=3, worst=0.7), line(cases=1, worst=0.4)).by_rule()["G1"]
    assert (found.cases, found.worst) == (6, 0.7)


def test_a_tally_refuses_unknown_families_and_rules():
    tally = Tally("test", [])
    with pytest.raises(KeyError, match="family"):
        tally.add("guesses", "torch", {"G1"})
    with pytest.raises(KeyError, match="rule"):
        tally.add("factors", "torch", {"Z9"})


def test_a_worst_case_is_replayed_by_one_command():
    tally = Tally("tests/parity/test_numbers.py::test_g4[a-b]", [])
    tally.add("factors", "torch", {"G1"}, 0.2, "Case('x y')")
    command = replay(tally.lines[0]["where"])
    assert command.startswith("nox -s parity -- -n0 --only 'tests/parity/test_numbers.py::test_g4[a-b]' --case ")


def test_the_text_names_every_rule_and_comparison():
    text = report(*complete(), *exact()).markdown(complete=True)
    assert all(f"| {rule} |" in text for rule in rules_of_spec())
    assert all(family.title in text for family in FAMILIES.values())
    assert "no verdict" not in text
    assert "no verdict" in report(line()).markdown(complete=False)
