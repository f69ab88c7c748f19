"""Hypothesis strategies: cases over a fixed table of shapes, values from a drawn seed and regime.

Apply ``@given`` in leaf test files, on functions:

    @given(cases())
    def test_d2_delta(case):
        check_delta(BACKEND, case)
"""

from typing import Any

from hypothesis import strategies as st

from hora_spec.activations import ACTIVATIONS
from hora_spec.layout import Layout, Window
from hora_spec.shapes import LayerShape, ProjectionShape
from hora_spec.spec import AdapterSpec
from hora_spec.testing.case import FIXED, FREE, GENERATING, LAYERS, REGIMES, SIZES, Case


def layers() -> st.SearchStrategy[LayerShape]:
    """One of the fixed table of layers."""
    return st.sampled_from(sorted(LAYERS)).map(LAYERS.__getitem__)


@st.composite
def specs(draw: Any) -> AdapterSpec:
    """A valid spec of one of the fixed sizes."""
    sharing, a_source = draw(st.sampled_from(GENERATING + FREE + FIXED))
    options: dict[str, Any] = {"sharing": sharing, "a_source": a_source}
    if (sharing, a_source) in GENERATING or sharing in ("full", "b"):
        options |= {
            "activation": draw(st.sampled_from(ACTIVATIONS)),
            "gain": draw(st.sampled_from(("transfer", 1.0, 0.3))),
        }
    if sharing in ("full", "b"):
        options |= {"residual": draw(st.booleans()), "normalize": draw(st.booleans())}
    if options.get("residual"):
        options["gate"] = draw(st.sampled_from((None, 1.0, 0.25)))
    return AdapterSpec(**draw(st.sampled_from(SIZES)), **options, alpha=draw(st.sampled_from((None, 6.0, 0.7))))


@st.composite
def stored_layouts(draw: Any) -> tuple[Layout, tuple[int, ...], ProjectionShape]:
    """A layout, the shape of a stored weight, and the projection in it; axes in any order, any window of whole heads.

    A window lies on an axis of output rows or on the embed axis, in one block or in several.
    """
    groups, heads, width, embed = (draw(st.integers(1, most)) for most in (3, 3, 3, 4))
    rows = draw(st.sampled_from((("hk",), ("h", "k"), ("g", "hk"), ("g", "h", "k"))))
    axes = draw(st.permutations((*rows, "d", *draw(st.sampled_from(((), ("1",), ("l",)))))))
    sizes = {"g": groups, "h": heads, "k": width, "hk": heads * width, "d": embed, "1": 1, "l": 2}
    shape, window = [sizes[axis] for axis in axes], None
    if axis := draw(st.sampled_from((None, *rows, "d"))):
        place = axes.index(axis)
        blocks = draw(st.sampled_from([n for n in range(1, shape[place] + 1) if shape[place] % n == 0]))
        before, after, part = draw(st.integers(0, 2)), draw(st.integers(0, 2)), shape[place] // blocks
        window = Window(place, before, before + part, blocks)
        shape[place] = blocks * (before + part + after)
    pattern = " ".join("(h k)" if axis == "hk" else axis for axis in axes)
    heads *= groups if "g" in rows else 1
    return Layout(pattern, window), tuple(shape), ProjectionShape(heads, width, embed)


def cases() -> st.SearchStrategy[Case]:
    """Cases: a spec, a layer, a seed and a regime."""
    return st.builds(Case, specs(), layers(), st.integers(0, 2**32 - 1), st.sampled_from(REGIMES))
