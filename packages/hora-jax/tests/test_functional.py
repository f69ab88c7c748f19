"""The conformance kit on `hora_jax.functional`, and what it cannot know: stacking, dtypes, differentiation, cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hora_jax import functional
from hora_spec import (
    AdapterSpec,
    Factors,
    Golden,
    HoraError,
    LayerShape,
    Layout,
    load_goldens,
    param_shapes,
    reference,
)
from hora_spec.testing import LAYERS, REFERENCE, Backend, Case, checks, corpus, laws, merging, strategies, tolerance
from hora_spec.testing.rounding import FORMATS
from hypothesis import given, settings

CASES = corpus()
ROUTES = ("branch", "merge", "plain")
GQA = LAYERS["gqa_3_1"]


def test_the_corpus_is_not_empty():
    assert len(CASES) > 50


@pytest.mark.parametrize("golden", load_goldens().values(), ids=str)
def test_the_stored_cases_are_reproduced(backend: Backend, golden: Golden):
    of = (golden.spec, golden.layer, golden.params)
    bounds = tolerance.delta(*of, FORMATS["float32"])
    for p, update in backend.delta(*of).items():
        assert (np.abs(update - golden.delta[p]) <= bounds[p].error).all()


@pytest.mark.parametrize("check", [checks.check_factors, checks.check_delta, checks.check_grads])
def test_generation_conforms(backend: Backend, check):
    assert max(check(backend, case) for case in CASES[::8]) <= 1


def test_g3_the_activation_has_the_slope_of_negative_inputs_at_its_kink(backend: Backend):
    at_zero = [case for case in CASES if case.spec.generates_b and case.regime == "zeros"]
    assert at_zero
    assert max(checks.check_grads(backend, case) for case in at_zero[:4]) <= 1


@pytest.mark.parametrize("group", [1, 2, 3])
def test_g2_heads_of_a_group_are_averaged_whatever_its_size(group):
    layer = LayerShape.attention(12, 2 * group, num_kv_heads=2)
    params = Case(AdapterSpec(3, hidden_dim=4, head_embed_dim=5), layer).inputs().params
    got = functional.factors(AdapterSpec(3, hidden_dim=4, head_embed_dim=5), layer, params)
    for p, made in reference.factors(AdapterSpec(3, hidden_dim=4, head_embed_dim=5), layer, params).items():
        np.testing.assert_allclose(got[p].b, made.b, rtol=1e-4, atol=1e-4)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(case=strategies.cases())
def test_the_delta_of_drawn_cases_conforms(case: Case):
    eager = REFERENCE._replace(name="hora_jax eager", delta=functional.delta)
    assert checks.check_delta(eager, case) <= 1


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("check", [checks.check_linear, checks.check_linear_grads])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_d3_the_adapted_projection_conforms(backends, route, check, dtype):
    assert max(check(backends(route), case, dtype) for case in CASES[::12]) <= 1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("check", [checks.check_delta, checks.check_grads, checks.check_linear_grads])
def test_float64_conforms(backend: Backend, check):
    assert max(check(backend, case, "float64") for case in CASES[::15]) <= 1


@pytest.mark.parametrize(
    "law",
    [
        laws.law_start,
        laws.law_permutation,
        laws.law_scale_and_shift,
        laws.law_merged_forward,
        laws.law_finite_differences,
    ],
)
def test_laws(backend: Backend, law):
    assert max(law(backend, case) for case in CASES[::12]) <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_m1_merging_rounds_once_in_every_stored_form(backend: Backend, dtype):
    assert merging.check_merge(backend, CASES[1], dtype) <= 1


@pytest.mark.parametrize("spec", [AdapterSpec(3), AdapterSpec.paper(3), AdapterSpec(3, sharing="none")])
def test_stacked_layers_equal_single_ones(spec: AdapterSpec):
    layers = [Case(spec, GQA, seed).inputs().params for seed in range(3)]
    stacked = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
    together = functional.delta(spec, GQA, stacked)
    for i, layer in enumerate(layers):
        for p, alone in functional.delta(spec, GQA, layer).items():
            np.testing.assert_allclose(together[p][i], alone, rtol=1e-5, atol=1e-5)


def test_the_program_that_generates_does_not_grow_with_layers():
    def program(layers: int) -> int:
        shapes = {n: jax.ShapeDtypeStruct((layers, *s), "float32") for n, s in param_shapes(AdapterSpec(), GQA).items()}
        lowered = jax.jit(functional.factors, static_argnums=(0, 1)).lower(AdapterSpec(), GQA, shapes)
        return lowered.compile().as_text().count("\n")

    assert program(32) <= program(2) + 5


@pytest.mark.parametrize("route", ROUTES)
def test_the_weight_has_no_gradient_and_the_bias_has_one(route):
    x, weight, bias, factors, scaling = linear_inputs()

    def loss(weight, bias):
        return functional.hora_linear(x, weight, bias, factors, scaling, route=route).sum()

    to_weight, to_bias = jax.grad(loss, argnums=(0, 1))(weight, bias)
    assert not to_weight.any()
    np.testing.assert_allclose(to_bias, np.full(bias.shape, x[..., 0].size))


@pytest.mark.parametrize("route", ROUTES)
def test_no_dense_gradient_is_computed(route):
    tokens, embed, rank = 256, 64, 2
    shape = LayerShape.attention(embed, 4)["q"]
    args = (
        jax.ShapeDtypeStruct((tokens, embed), "float32"),
        jax.ShapeDtypeStruct(shape.weight_shape, "float32"),
        Factors(jax.ShapeDtypeStruct((rank, embed), "float32"), jax.ShapeDtypeStruct((4, 16, rank), "float32")),
    )

    def loss(x, weight, factors):
        return functional.hora_linear(x, weight, None, factors, 1.0, route=route).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 2))).lower(*args).compile()
    dense = 2 * tokens * embed * embed  # one product of activations and weight
    assert compiled.cost_analysis()["flops"] < 2.6 * dense  # forward, backward to x, and thin products; not three


def test_forward_mode_works_on_the_plain_route():
    x, weight, bias, factors, scaling = linear_inputs()
    tangent = jax.jvp(
        lambda x: functional.hora_linear(x, weight, bias, factors, scaling, route="plain"), (x,), (jnp.ones_like(x),)
    )[1]
    expected = reference.hora_linear(np.ones(x.shape), weight, None, factors, scaling)
    np.testing.assert_allclose(tangent, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("route", ["branch", "merge"])
def test_forward_mode_on_another_route_says_what_to_do(route):
    x, weight, bias, factors, scaling = linear_inputs()
    with pytest.raises(HoraError, match='pass route="plain"'):
        jax.jvp(lambda x: functional.hora_linear(x, weight, bias, factors, scaling, route=route), (x,), (x,))


def test_auto_merges_many_float32_tokens_and_branches_else():
    _, weight, bias, factors, scaling = linear_inputs()
    embed = weight.shape[1]

    def dots(x: jax.Array) -> int:
        return str(jax.make_jaxpr(functional.hora_linear, static_argnums=4)(x, weight, bias, factors, scaling)).count(
            "dot_general"
        )

    assert dots(jnp.ones((embed + 1, embed))) == 2  # the sum, and one product
    assert dots(jnp.ones((embed, embed))) == 3
    assert dots(jnp.ones((embed + 1, embed), jnp.bfloat16)) == 3


def test_activations_keep_their_dtype_and_factors_keep_theirs():
    x, weight, bias, factors, scaling = linear_inputs("bfloat16")
    grads = jax.grad(lambda x, f: functional.hora_linear(x, weight, bias, f, scaling).sum(), argnums=(0, 1))(x, factors)
    assert jax.tree.map(lambda g: g.dtype.name, grads) == ("bfloat16", Factors("float32", "float32"))


SIXTEEN_BITS = {"bfloat16": 257, "float16": 2049}
"""Numbers of tokens, each one more than the last number up to which the dtype holds every integer."""


@pytest.mark.parametrize("head_owns_a", [False, True])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("route", ["auto", "branch", "merge"])
def test_gradients_of_factors_are_summed_over_tokens_in_float32(route, dtype, head_owns_a):
    tokens = SIXTEEN_BITS[dtype]
    assert int(jnp.asarray(tokens, dtype)) != tokens
    x, weight = jnp.ones((tokens, 1), dtype), jnp.zeros((1, 1), dtype)
    factors = Factors(jnp.ones((1, 1, 1) if head_owns_a else (1, 1)), jnp.ones((1, 1, 1)))
    grads = jax.grad(lambda f: functional.hora_linear(x, weight, None, f, 1.0, route=route).astype(float).sum())(
        factors
    )
    assert (grads.a.item(), grads.b.item()) == (tokens, tokens)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("route", ["auto", *ROUTES])
def test_a_delta_below_the_rounding_of_a_sixteen_bit_weight_is_not_lost(route, dtype):
    """``x W^T`` is zero, so the delta is all that is left; ``W + delta`` would be ``W`` again."""
    delta = 2.0**-12
    x, weight = jnp.ones((3, 2), dtype), jnp.asarray([[1, -1]], dtype)
    assert (weight + jnp.asarray(delta, dtype) == weight).all()
    factors = Factors(jnp.asarray([[delta, 0.0]]), jnp.ones((1, 1, 1)))
    y = functional.hora_linear(x, weight, None, factors, 1.0, route=route)
    assert (y.dtype.name, *y[:, 0].tolist()) == (dtype, delta, delta, delta)


@pytest.mark.parametrize("spec", [AdapterSpec(3), AdapterSpec(3, a_source="hypernetwork", residual=True)], ids=str)
def test_generation_has_the_highest_precision_whatever_the_default(spec: AdapterSpec):
    shapes = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in param_shapes(spec, GQA).items()}

    def loss(params):
        return sum(jnp.sin(update).sum() for update in functional.delta(spec, GQA, params).values())

    with jax.default_matmul_precision("bfloat16"):
        program = str(jax.make_jaxpr(jax.grad(loss))(shapes))
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == program.count("dot_general") > 0


def test_vmap_over_examples_is_the_batch():
    x, weight, bias, factors, scaling = linear_inputs()
    together = functional.hora_linear(x, weight, bias, factors, scaling, route="branch")
    apart = jax.vmap(lambda x: functional.hora_linear(x, weight, bias, factors, scaling, route="branch"))(x)
    np.testing.assert_allclose(apart, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": lambda w: w.T}, "transpose Flax kernels first"),
        ({"factors": lambda f: Factors(f.a.T, f.b)}, "a \\(rank, embed\\)"),
        ({"route": lambda _: "dense"}, "route must be one of auto, branch, merge, plain"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    x, weight, bias, factors, scaling = linear_inputs()
    given = {"weight": weight, "factors": factors, "route": "auto"}
    given |= {name: function(given[name]) for name, function in change.items()}
    with pytest.raises(HoraError, match=message):
        functional.hora_linear(x, given["weight"], bias, given["factors"], scaling, route=given["route"])


def test_s6_parameters_that_do_not_fit_are_refused():
    params = Case(AdapterSpec(3), GQA).inputs().params
    with pytest.raises(HoraError, match=r"a\.q must have shape"):
        functional.factors(AdapterSpec(3), GQA, params | {"a.q": params["a.q"].T})
    with pytest.raises(HoraError, match="exactly"):
        functional.factors(AdapterSpec(3, residual=True), GQA, params)
    with pytest.raises(HoraError, match="leading axes that all parameters share"):
        functional.factors(AdapterSpec(3), GQA, params | {"b_in": np.stack([params["b_in"]] * 2)})


@pytest.mark.parametrize(
    ("weight", "delta", "layout"),
    [
        ((16, 4), (16, 16), Layout("d h k")),
        ((16, 4, 4), (16, 15), Layout("d h k")),
        ((16, 4, 4), (3, 16, 16), Layout("d h k")),
        ((3, 16, 4, 4), (2, 16, 16), Layout("l d h k")),
        ((16, 4, 4), (16, 16), "d h k"),
    ],
)
def test_a_delta_of_another_shape_is_not_merged(weight, delta, layout):
    with pytest.raises(HoraError, match="got"):
        functional.merge(jnp.ones(weight), jnp.ones(delta), layout)


@pytest.mark.parametrize("route", ROUTES)
def test_d3_heads_that_own_their_a_read_inputs_of_their_own(route):
    case = Case(AdapterSpec(3, sharing="none"), GQA)
    inputs = case.inputs()
    for p, factors in reference.factors(case.spec, case.layer, inputs.params).items():
        args = inputs.x[p], inputs.weight[p]
        got = functional.hora_linear(*args, None, Factors(*map(jnp.asarray, factors)), 2.0, route=route)
        np.testing.assert_allclose(got, reference.hora_linear(*args, None, factors, 2.0), rtol=1e-3, atol=1e-3)


def linear_inputs(dtype: str = "float32"):
    """Tokens, weight, bias, factors and scaling of one projection."""
    case = Case(AdapterSpec(3, alpha=6.0), GQA)
    inputs = case.inputs(dtype)
    factors = reference.factors(case.spec, case.layer, inputs.params)["q"]
    x, weight, bias = (jnp.asarray(v["q"]) for v in (inputs.x, inputs.weight, inputs.bias))
    return x, weight, bias, Factors(*(jnp.asarray(part, "float32") for part in factors)), case.spec.scaling
