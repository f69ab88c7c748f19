"""The corpus covers what the specification allows."""

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
