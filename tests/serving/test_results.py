"""The tables of the guide are those of the stored results, and all servers computed what was trained."""

import json

from hora_spec.gguf_adapter import ARCHITECTURES

from .table import BEGIN, BOUND, ENGINES, FORMS, MANY, MANY_BEGIN, PAGE, RESULTS, filled

RESULT = json.loads(RESULTS.read_text())
CASES = {"base", "full", "a", "b", "none"}


def test_the_guide_shows_the_results():
    """If not, run ``python tests/serving/table.py``."""
    page = PAGE.read_text()
    assert page.count(BEGIN) == page.count(MANY_BEGIN) == 1
    assert filled(page) == page


def test_every_engine_computed_every_case_alike():
    assert FORMS.keys() == ENGINES.keys() == RESULT["distances"].keys()
    assert set(ENGINES["llama.cpp"][1]) == set(ARCHITECTURES)
    for engine, (_, names) in ENGINES.items():
        assert RESULT["versions"][engine]
        assert RESULT["distances"][engine].keys() == set(names)
        for row in RESULT["distances"][engine].values():
            assert row.keys() == CASES
            assert max(row.values()) < BOUND


def test_many_adapters_were_measured_on_both_methods():
    rows = json.loads(MANY.read_text())["rows"]
    assert {row["adapters"] for row in rows} == {1, 8, 64}
    assert {row["method"] for row in rows} == {"LoRA", "HoRA", "HoRA, cached", "HoRA, frozen"}
