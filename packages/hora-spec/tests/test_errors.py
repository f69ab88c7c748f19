"""Errors: one type, and a message that cites its rule."""

import ast
from pathlib import Path

import hora_spec
import pytest
from hora_spec import AdapterSpec, HoraError

FILES = sorted(Path(hora_spec.__file__).parent.glob("*.py"))


def test_e1_bad_input_is_a_value_error():
    with pytest.raises(ValueError, match=r"rank must be an integer of at least 1, got 0 \(spec S1\)") as caught:
        AdapterSpec(0)
    assert type(caught.value) is HoraError


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_e1_every_message_cites_its_rule(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "HoraError":
            assert "(spec " in ast.unparse(node), f"{file.name}:{node.lineno} raises a HoraError that cites no rule"


def test_e1_there_are_files_to_look_at():
    assert len(FILES) > 5
