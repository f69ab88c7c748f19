"""Running only the tests that run a mutant's lines, in a process that has them imported, changes no outcome."""

import importlib
import json
import math
import sys
from collections import Counter
from pathlib import Path

import pytest

CODE = """
import functools

LIMIT = 3

def _table():
    return [number * 2 for number in range(LIMIT)]

TABLE = _table()

def unseen(x):
    return x + 1

def shared(x):
    return x + 1

@functools.cache
def cached(x):
    return x + 1

def outside(x):
    return x + 1

def wraps(function):
    @functools.wraps(function)
    def inner(x):
        return function(x) + 1
    return inner

@wraps
def wrapped(x):
    return x * 2

class Steps:
    step = 1

    def taken(self, x):
        return [each + self.step for each in x if each > 0]

def down(x):
    while x > 0:
        x -= 1
    return x

def refused(x):
    try:
        return 1 // x
    except ZeroDivisionError:
        return 2
"""

TESTS = """
import subprocess
import sys

import pytest
from planted import code

@pytest.fixture(scope="module")
def of_all():
    return code.shared(1)

def test_fixture_is_made(of_all):
    pass

def test_fixture_is_looked_at(of_all):
    assert of_all == 2

def test_cache_is_filled():
    code.cached(1)

def test_cache_is_read():
    assert code.cached(1) == 2

def test_table():
    assert code.TABLE == [0, 2, 4]

def test_process():
    command = "from planted import code; assert code.outside(1) == 2"
    subprocess.run([sys.executable, "-c", command], check=True)

def test_wrapped():
    assert code.wrapped(3) == 7

def test_steps():
    assert code.Steps().taken([-1, 0, 1]) == [2]

"""

MORE = """
from planted import code

def test_down():
    assert code.down(3) == 0

def test_nothing():
    pass

def test_refused():
    assert code.refused(1) == 1
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    pytest.importorskip("cosmic_ray", reason="installed by nox -s mutation")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for name in ("modules", "mutants", "runner", "selection", "run"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    package, tests = tmp_path / "packages/planted/src/planted", tmp_path / "packages/planted/tests"
    package.mkdir(parents=True)
    tests.mkdir()
    (package / "__init__.py").touch()
    (package / "code.py").write_text(CODE)
    (tests / "test_code.py").write_text(TESTS)
    (tests / "test_more.py").write_text(MORE)
    (tmp_path / "conftest.py").touch()
    run = importlib.import_module("run")
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(importlib.import_module("runner"), "SPARE_S", 0)
    files = tuple(f"packages/planted/tests/test_{name}.py" for name in ("code", "more"))
    return run, run.Module("planted.code", files, ("json",), tmp_path)


def test_a_selection_of_tests_has_the_outcome_of_all_in_an_import_of_their_own(planted):
    run, module = planted
    runner = run.Runner(module)
    selection = run.prepared(module, [runner])
    line = CODE.splitlines().index("        x -= 1") + 1
    runs, fresh = selection.of(range(line, line + 1), Counter())
    assert ({name.partition("::")[2] for name in runs}, fresh) == ({"test_down", "test_process"}, False)
    chosen, every, kinds, kills = {}, {}, Counter(), {True: Counter(), False: Counter()}
    for mutant in run.mutants(module.source):
        result = run.outcome(module, mutant, selection, runner, kills)
        kinds[result["run"] < len(selection.every)] += 1
        chosen[mutant.name] = result["outcome"]
        every[mutant.name] = runner.run(mutant.code, selection.every, selection.seconds, fresh=True)["outcome"]
    runner.close()
    assert chosen == every
    assert kinds[True] > 10
    assert Counter(every.values()).keys() == {"killed", "timeout", "survived"}
    assert every["unseen: return x + 1 -> return x - 1"] == "survived"
    assert every["shared: return x + 1 -> return x - 1"] == "killed"
    assert every["cached: return x + 1 -> return x - 1"] == "killed"
    assert every["outside: return x + 1 -> return x - 1"] == "killed"
    assert every["down: x -= 1 -> pass"] == "timeout"


def test_a_first_pass_decides_what_its_tests_notice_and_leaves_the_rest_open(planted, monkeypatch):
    run, module = planted
    monkeypatch.setattr(run, "HERE", module.root)
    monkeypatch.setattr(run, "RAN", module.root / "ran.json")
    (module.root / "survivors.toml").touch()
    run.RAN.write_text("{}")
    every = list(run.mutants(module.source))
    first = run.run(module, every, 1, seconds=0)
    kept = (run.RESULTS / "planted.code.jsonl").read_text().splitlines()
    whole = run.run(module, every, 1, seconds=math.inf)
    found = Counter(result["outcome"] for result in first.values())
    assert min(found["killed"], found["open"]) > 5
    assert len(kept) == len(every) - found["open"]
    for name, result in first.items():
        assert result["run"] <= 1
        assert result["outcome"] in (whole[name]["outcome"], "open"), name
    assert Counter(result["outcome"] for result in whole.values())["open"] == 0
    listed = [name for name, result in whole.items() if result["outcome"] == "survived"]
    entries = [f"[['planted.code']]\nmutant = {json.dumps(name)}\nwhy = 'equivalent: it is'\n" for name in listed]
    (module.root / "survivors.toml").write_text("".join(entries))
    assert not run.check(module, 1)
    assert json.loads(run.RAN.read_text())["planted.code"]["survived"] == len(listed)
