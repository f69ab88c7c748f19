"""torch, JAX and the reference compute the same arrays: every golden case, every dtype, route and way to compile."""

from collections.abc import Callable
from dataclasses import replace

import hora_spec
import pytest
from hora_spec import AdapterSpec, load_goldens
from hora_spec.testing import LAYERS, REGIMES, Case, check_golden
from hypothesis import given
from hypothesis import strategies as st

from .checks import GENERATION, INIT, LAWS, MERGE, REFUSES, ROUTES, agree, run, same_bits

GOLDENS = load_goldens()
CASES = {name: Case(golden.spec, golden.layer, golden.seed, golden.regime) for name, golden in GOLDENS.items()}
SOME = dict(list(CASES.items())[::7])
# storing has nothing to do with the method, and every layout compiles anew: one layer for each dtype will do
MERGED = {
    "float64": Case(AdapterSpec(rank=3), LAYERS["uneven"], seed=1),
    "float32": Case(AdapterSpec(rank=3), LAYERS["multi_query"], seed=2),
    "float16": Case(AdapterSpec(rank=3), LAYERS["gqa_2_1"], seed=3),
    "bfloat16": Case(AdapterSpec(rank=3), LAYERS["gqa_3_1"], seed=4),
}
FRAMEWORKS = ("torch", "jax")

every = pytest.mark.parametrize("name", CASES)
some = pytest.mark.parametrize("name", SOME)
dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])


def test_the_corpus_is_not_empty():
    assert len(CASES) >= 40
    assert len(SOME) >= 8


@every
@dtypes
def test_g1_arrays_of_every_golden(dtype, name, backends, tally):
    case = CASES[name]
    torch, jax = (backends[framework] for framework in FRAMEWORKS)
    for backend in (torch, jax):
        run((*GENERATION, *ROUTES), backend, case, dtype, tally)
        # the largest ratio of a golden is that of its merged weights, which may be one float32 rounding apart
        tally.add("goldens", f"{backend.name} {dtype}", {"M1"}, check_golden(backend, GOLDENS[name], dtype))
    tally.add("torch against JAX", dtype, {"G4", "G7", "D2", "D3"}, agree(torch, jax, case, dtype))


@every
def test_i1_starts_are_equal_to_the_bit(name, backends, tally):
    for framework in FRAMEWORKS:
        run((INIT,), backends[framework], CASES[name], "float32", tally)
    same_bits(backends["torch"], backends["jax"], CASES[name])


@pytest.mark.parametrize("dtype", MERGED)
def test_m1_merged_weights_of_every_layout(dtype, backends, tally):
    for framework in FRAMEWORKS:
        run((MERGE, REFUSES), backends[framework], MERGED[dtype], dtype, tally)


@some
@dtypes
def test_d3_merge_route(dtype, name, backends, tally):
    for framework in FRAMEWORKS:
        run(ROUTES, backends[f"{framework} merge"], CASES[name], dtype, tally)


@some
def test_d3_bfloat16(name, backends, tally):
    for way in ("torch", "torch merge", "jax", "jax merge"):
        run(ROUTES, backends[way], CASES[name], "bfloat16", tally)


@pytest.mark.parametrize("name", list(SOME)[::2])
@pytest.mark.parametrize("way", ["torch compiled", "jax eager"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch's own tracer, 2.13
def test_g4_the_other_way_to_run(way, name, backends, tally):
    run((*GENERATION, *ROUTES), backends[way], CASES[name], "float32", tally)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@some
def test_g7_laws(name, framework, backends, tally):
    run(LAWS, backends[framework], CASES[name], "float64", tally)


drawn = st.builds(
    replace, st.sampled_from(list(SOME.values())), seed=st.integers(0, 2**32 - 1), regime=st.sampled_from(REGIMES)
)


@dtypes
def test_g4_drawn_values(dtype, backends, tally, pytestconfig):
    """Seeds and regimes are drawn; shapes and methods come from the table, for each new one is compiled anew."""

    def holds(case: Case) -> None:
        for framework in FRAMEWORKS:
            run((*GENERATION, *ROUTES), backends[framework], case, dtype, tally, replay=True)

    if replayed := pytestconfig.getoption("--case", None):
        holds(eval(replayed, vars(hora_spec) | {"Case": Case}))
    else:
        given(drawn)(holds)()


def session_cases(check: Callable[..., float], dtype: str) -> list[Case]:
    """The cases on which this session runs a check of the conformance kit in `dtype`, on both frameworks."""
    if check in (MERGE.run, REFUSES.run):
        return [MERGED[dtype]]
    dtypes = {INIT.run: {"float32"}} | {each.run: {"float64", "float32"} for each in (*GENERATION, *ROUTES)}
    return list(CASES.values()) if dtype in dtypes.get(check, ()) else []
