"""The table of the guide is that of the stored results, and all of them are good."""

import json

from hora_spec.gguf_adapter import ARCHITECTURES

from .table import BEGIN, BOUND, ENGINES, FORMS, PAGE, RESULTS, filled

RESULT = json.loads(RESULTS.read_text())
CASES = {"base", "full", "a", "b", "none"}


def test_the_guide_shows_the_results():
    page = PAGE.read_text()
    assert page.count(BEGIN) == 1
    assert filled(page, RESULT) == page


def test_every_engine_computed_every_case_alike():
    assert FORMS.keys() == ENGINES.keys() == RESULT["distances"].keys()
    assert set(ENGINES["llama.cpp"][1]) == set(ARCHITECTURES)
    for engine, (_, names) in ENGINES.items():
        assert RESULT["versions"][engine]
        assert RESULT["distances"][engine].keys() == set(names)
        for row in RESULT["distances"][engine].values():
            assert row.keys() == CASES
            assert max(row.values()) < BOUND
