"""The corpus covers what the specification allows."""

import subprocess
import sys
from itertools import product

import pytest
from hora_spec import ACTIVATIONS, AdapterSpec, HoraError
from hora_spec.testing import corpus

CASES = corpus()


def test_the_corpus_is_not_empty():
    assert len(CASES) >= 40


@pytest.mark.parametrize("sharing", ["full", "a", "b", "none"])
def test_every_valid_method_has_a_case(sharing):
    present = {(c.spec.sharing, c.spec.a_source, c.spec.activation, c.spec.gain) for c in CASES}
    for method in product([sharing], ["direct", "hypernetwork"], ACTIVATIONS, ["transfer", 1.0]):
        try:
            AdapterSpec(**dict(zip(("sharing", "a_source", "activation", "gain"), method, strict=True)))
        except HoraError:
            continue
        assert method in present


def test_the_kit_needs_hypothesis_for_strategies_alone():
    program = "import sys; sys.modules['hypothesis'] = None; import hora_spec.testing.mutants, hora_spec.goldens.build"
    subprocess.run([sys.executable, "-c", program], check=True)
    refused = subprocess.run([sys.executable, "-c", f"{program}, hora_spec.testing.strategies"], capture_output=True)
    assert b"hypothesis" in refused.stderr
