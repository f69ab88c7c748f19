"""Hypothesis strategies: cases over a fixed table of shapes, values from a drawn seed and regime.

Apply ``@given`` in leaf test files, on functions:

    @given(cases())
    def test_d2_delta(case):
        check_delta(BACKEND, case)
"""

from typing import Any

from hypothesis import strategies as st

from hora_spec.activations import ACTIVATIONS
from hora_spec.shapes import LayerShape
from hora_spec.spec import AdapterSpec
from hora_spec.testing.case import FREE, GENERATING, LAYERS, REGIMES, SIZES, Case


def layers() -> st.SearchStrategy[LayerShape]:
    """One of the fixed table of layers."""
    return st.sampled_from(sorted(LAYERS)).map(LAYERS.__getitem__)


@st.composite
def specs(draw: Any) -> AdapterSpec:
    """A valid spec of one of the fixed sizes."""
    sharing, a_source = draw(st.sampled_from(GENERATING + FREE))
    options: dict[str, Any] = {"sharing": sharing, "a_source": a_source}
    if (sharing, a_source) in GENERATING:
        options |= {
            "activation": draw(st.sampled_from(ACTIVATIONS)),
            "gain": draw(st.sampled_from(("transfer", 1.0, 0.3))),
        }
    if sharing in ("full", "b"):
        options |= {"residual": draw(st.booleans()), "normalize": draw(st.booleans())}
    return AdapterSpec(**draw(st.sampled_from(SIZES)), **options, alpha=draw(st.sampled_from((None, 6.0, 0.7))))


def cases() -> st.SearchStrategy[Case]:
    """Cases: a spec, a layer, a seed and a regime."""
    return st.builds(Case, specs(), layers(), st.integers(0, 2**32 - 1), st.sampled_from(REGIMES))
