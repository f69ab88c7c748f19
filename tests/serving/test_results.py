"""The tables of the guide are those of the stored results, and all servers computed what was trained."""

import json

from hora_spec.gguf_adapter import ARCHITECTURES

from .adapted import FELT
from .guide import blocks
from .table import BEGIN, BOUND, ENGINES, FORMS, MANY, MANY_BEGIN, METHODS, PAGE, RESULTS, SERVERS, filled

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


def test_the_commands_of_servers_were_run_as_the_guide_has_them_now():
    """If not, run ``nox -s serving``."""
    shown = {(block.heading, block.kind): block.lines for block in blocks()}
    assert RESULT["commands"].keys() == SERVERS.keys()
    for heading, kinds in SERVERS.items():
        assert RESULT["commands"][heading].keys() == set(kinds)
        for kind, entry in RESULT["commands"][heading].items():
            assert entry["lines"] == shown[heading, kind]
            assert entry["right"]
            assert entry["version"]


def test_the_guide_says_how_far_adapters_move_what_is_compared():
    assert f"adapters move these by more than {FELT}, under every" in PAGE.read_text()


def test_many_adapters_were_measured_on_both_methods_and_the_control_is_lora():
    rows = json.loads(MANY.read_text())["rows"]
    assert [(row["layers_count"], row["adapters_count"]) for row in rows] == [(30, 1), (30, 8), (30, 64)]
    for row in rows:
        for kind in ("one", "mixed"):
            assert row[kind].keys() == METHODS.keys()
        assert row["adapter_bytes"]["frozen"] == row["adapter_bytes"]["lora"] < row["adapter_bytes"]["hora"]
