"""The mutation tester's own claims; running it takes hours and is a session of its own."""

import ast
import json
import tomllib
from pathlib import Path

import pytest

from . import modules

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODULES = tomllib.loads((HERE / "modules.toml").read_text())
PACKAGES = MODULES["packages"]
SURVIVORS = tomllib.loads((HERE / "survivors.toml").read_text())
REASONS = ("equivalent", "performance", "message", "refused elsewhere", "beyond these tests")

SOURCE = '''
@dataclass(frozen=True, slots=True)
class Empty:
    pass

def scaled(x: int, *, by: float = 2) -> int:
    """A docstring with 1 number."""
    if x is None:
        raise ValueError(f"x is a number, got {x - 1}")
    try:
        by = by.value
    except (AttributeError, numpy.exceptions.AxisError):
        pass
    total: int | float = 0
    for one, other in zip([x], [by], strict=True):
        total += round(one * other, ndigits=0)
    return total
'''


def mutants_of(source):
    pytest.importorskip("cosmic_ray", reason="installed by nox -s mutation")
    from . import mutants

    return {mutant.name: mutant.code for mutant in mutants.mutants(source)}


def test_every_module_with_code_is_mutated():
    for name, package in PACKAGES.items():
        folder = ROOT / "packages" / name.replace("_", "-") / "src" / name
        assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == package["modules"].keys()


def test_what_is_said_to_have_run_ran_on_this_source():
    stale = [*modules.stale()]
    cure = "run `nox -s mutation -- MODULE`, or take its entry out of ran.json"
    assert not stale, f"{stale} changed since all mutants were run: {cure}"


def test_a_survivor_of_what_ran_is_listed():
    for module, result in json.loads(modules.RAN.read_text()).items():
        assert result["survived"] <= len(SURVIVORS.get(module, [])), module


def test_words_make_no_claim_stale_and_code_does():
    reworded = SOURCE.replace("A docstring", "Other words").replace("    pass", "    pass  # why")
    assert reworded != SOURCE
    assert modules.meaning(reworded) == modules.meaning(SOURCE)
    assert modules.meaning(SOURCE.replace("ndigits=0", "ndigits=1")) != modules.meaning(SOURCE)


def test_the_tests_of_a_module_exist():
    for package in PACKAGES.values():
        for tests in package["modules"].values():
            assert tests
            assert all((ROOT / package["tests"] / test).exists() for test in tests)


def test_each_listed_survivor_has_a_reason_of_a_known_kind():
    for module, entries in SURVIVORS.items():
        package, _, own = module.partition(".")
        assert own in PACKAGES[package]["modules"]
        for entry in entries:
            assert " -> " in entry["mutant"]
            assert entry["why"].partition(": ")[0] in REASONS, entry
        assert len({entry["mutant"] for entry in entries}) == len(entries)


def test_each_mutant_differs_in_meaning_from_its_source_and_has_a_name_of_its_own():
    codes = mutants_of(SOURCE)
    assert codes
    assert ast.dump(ast.parse(SOURCE)) not in {ast.dump(ast.parse(code)) for code in codes.values()}


@pytest.mark.parametrize(
    "name",
    [
        "scaled: if x is None: -> if x is not None:",
        "scaled: total: int | float = 0 -> total: int | float = 1",
        "scaled: total += round(one * other, ndigits=0) -> pass",
        "scaled: total += round(one * other, ndigits=0) -> total += round(one / other, ndigits=0)",
        "scaled: total += round(one * other, ndigits=0) -> total += round(one * other,)",
        'scaled: raise ValueError(f"x is a number, got {x - 1}") -> pass',
        *(
            f"scaled: except (AttributeError, numpy.exceptions.AxisError): -> except ({names}):"
            for names in (
                "CosmicRayTestingException, numpy.exceptions.AxisError",
                "AttributeError, numpy.exceptions.CosmicRayTestingException",
            )
        ),
        "scaled: for one, other in zip([x], [by], strict=True): -> for one, other in []:",
        "scaled: def scaled(x: int, *, by: float = 2) -> int: -> def scaled(x: int, *, by: float = 3) -> int:",
    ],
)
def test_a_mistake_of_each_kind_is_made(name):
    assert name in mutants_of(SOURCE)


@pytest.mark.parametrize(
    "idle",
    [
        "int & float",
        "strict=False",
        "x + 1",
        "docstring with 2",
        "not x is None",
        "frozen=False",
        "(slots=True)",
        "= -1",
    ],
)
def test_what_means_nothing_is_left_alone(idle):
    assert not [name for name, code in mutants_of(SOURCE).items() if idle in code]
