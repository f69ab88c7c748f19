"""torch, JAX and the reference compute the same arrays: every golden case, every dtype, route and way to compile."""

from dataclasses import replace

import pytest
from hora_spec.testing import REGIMES, Case, corpus
from hypothesis import given
from hypothesis import strategies as st

from .checks import GENERATION, INIT, LAWS, MERGE, REFUSES, ROUTES, agree, run, same_bits

CASES = corpus()
SOME = CASES[::6]
FEW = CASES[3::20]
FRAMEWORKS = ("torch", "jax")

every = pytest.mark.parametrize("number", range(len(CASES)))
some = pytest.mark.parametrize("number", range(len(SOME)))
dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])


@every
@dtypes
def test_g1_arrays_of_every_case(dtype, number, backends, tally):
    torch, jax = (backends[framework] for framework in FRAMEWORKS)
    for backend in (torch, jax):
        run((*GENERATION, *ROUTES), backend, CASES[number], dtype, tally)
    ratio = agree(torch, jax, CASES[number], dtype)
    tally.add("torch against JAX", dtype, {"G4", "G7", "D2", "D3"}, ratio)


@every
def test_i1_starts_are_equal_to_the_bit(number, backends, tally):
    for framework in FRAMEWORKS:
        run((INIT,), backends[framework], CASES[number], "float32", tally)
    same_bits(backends["torch"], backends["jax"], CASES[number])


@pytest.mark.parametrize(
    ("dtype", "number"), [("float64", 1), ("float32", 1), ("float16", 2), *(("bfloat16", n) for n in range(3))]
)
def test_m1_merged_weights_of_every_layout(dtype, number, backends, tally):
    for framework in FRAMEWORKS:
        run((MERGE, REFUSES), backends[framework], FEW[number], dtype, tally)


@some
@dtypes
def test_d3_merge_route(dtype, number, backends, tally):
    for framework in FRAMEWORKS:
        run(ROUTES, backends[f"{framework} merge"], SOME[number], dtype, tally)


@some
def test_d3_bfloat16(number, backends, tally):
    for name in ("torch", "torch merge", "jax", "jax merge"):
        run(ROUTES, backends[name], SOME[number], "bfloat16", tally)


@some
@pytest.mark.parametrize("name", ["torch compiled", "jax eager"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch's own tracer, 2.13
def test_g4_the_other_way_to_run(name, number, backends, tally):
    run((*GENERATION, *ROUTES), backends[name], SOME[number], "float32", tally)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@some
def test_g7_laws(number, framework, backends, tally):
    run(LAWS, backends[framework], SOME[number], "float64", tally)


@dtypes
@given(case=st.builds(replace, st.sampled_from(SOME), seed=st.integers(0, 2**32), regime=st.sampled_from(REGIMES)))
def test_g4_drawn_values(dtype, backends, tally, case: Case):
    for framework in FRAMEWORKS:
        run((*GENERATION, *ROUTES), backends[framework], case, dtype, tally, replay=True)
