"""The reference, against arithmetic done by hand and against central differences."""

import numpy as np
import pytest
from hora_spec import (
    ACTIVATIONS,
    AdapterSpec,
    HoraError,
    LayerShape,
    Layout,
    ProjectionShape,
    Window,
    generated_share,
    init_params,
    param_shapes,
)
from hora_spec.reference import activation, activation_slope, delta, factors, grads, hora_linear, merge, normalize

EPS_ROOT = np.sqrt(1 + 1e-5)  # standard deviation that LN sees for a column of variance one


def test_g1_normalisation_of_two_numbers_by_hand():
    np.testing.assert_allclose(normalize(np.array([[1.0], [3.0]])), [[-1 / EPS_ROOT], [1 / EPS_ROOT]], rtol=1e-15)


def test_g1_a_constant_column_becomes_zero():
    assert (normalize(np.full((5, 2), 3.0)) == 0).all()


def test_g4_one_head_of_rank_one_by_hand():
    """E = (1, 3) gives z = (-1, 1)/c; W1 z = (3, -1)/c; leaky ReLU (3, -0.01)/c; W2 (1, 2) gives 2.98/c."""
    spec = AdapterSpec(1, hidden_dim=2, head_embed_dim=2, gain=10.0, alpha=2)
    layer = LayerShape({"q": ProjectionShape(1, 1, 2)})
    params = {
        "a.q": np.array([[5.0, 7.0]]),
        "head_embed": np.array([[[1.0], [3.0]]]),
        "b_in": np.array([[0.0, 3.0], [1.0, 0.0]]),
        "b_out.q": np.array([[1.0, 2.0]]),
    }
    b = 10 * 2.98 / EPS_ROOT
    result = factors(spec, layer, params)["q"]
    np.testing.assert_allclose(result.b, [[[b]]], rtol=1e-15)
    np.testing.assert_allclose(result.a, [[5, 7]])
    np.testing.assert_allclose(delta(spec, layer, params)["q"], [[2 * 5 * b, 2 * 7 * b]], rtol=1e-15)


def test_g2_two_query_heads_and_one_value_head_by_hand():
    """v averages (1, 3) and (5, 3) to the constant (3, 3), which LN makes zero; q sees (-1, 1) and (1, -1)."""
    spec = AdapterSpec(1, hidden_dim=1, head_embed_dim=2, gain=1.0, activation="identity")
    layer = LayerShape({"q": ProjectionShape(2, 1, 1), "v": ProjectionShape(1, 1, 1)})
    params = {
        "a.q": np.array([[1.0]]),
        "a.v": np.array([[1.0]]),
        "head_embed": np.array([[[1.0], [3.0]], [[5.0], [3.0]]]),
        "b_in": np.array([[0.0, 2.0]]),
        "b_out.q": np.array([[3.0]]),
        "b_out.v": np.array([[3.0]]),
    }
    result = delta(spec, layer, params)
    np.testing.assert_allclose(result["q"], [[6 / EPS_ROOT], [-6 / EPS_ROOT]], rtol=1e-5)
    np.testing.assert_allclose(result["v"], [[0.0]])
    params["head_embed"][1] = [[1.0], [7.0]]  # now the mean is (1, 5): v is the same map of LN(1, 5), var 4
    np.testing.assert_allclose(delta(spec, layer, params)["v"], [[3 * 2 * 2 / np.sqrt(4 + 1e-5)]], rtol=1e-15)


GATED = AdapterSpec(1, hidden_dim=1, head_embed_dim=2, activation="identity", residual=True, gate=0.5)
ONE_HEAD = LayerShape({"q": ProjectionShape(1, 1, 1)})
ONE_HEAD_PARAMS = {
    "a.q": np.array([[1.0]]),
    "head_embed": np.array([[[1.0], [3.0]]]),
    "b_in": np.array([[0.0, 2.0]]),
    "b_out.q": np.array([[3.0]]),
    "b.q": np.array([[[7.0]]]),
    "gate.q": np.array([0.25]),
}


def test_g8_a_gate_by_hand():
    """Generated 3 * 2 * 1/c, free 7, gate 0.25; both gains are 1 / 1.5, that of B also its own."""
    gain = 1 / np.sqrt(2 / (3 * np.pi)) / 1.5
    expected = gain * 6 / EPS_ROOT + 0.25 * 7 / 1.5
    np.testing.assert_allclose(factors(GATED, ONE_HEAD, ONE_HEAD_PARAMS)["q"].b, [[[expected]]], rtol=1e-15)
    literal = GATED.replace(gain=2.0)
    expected = 2 * 6 / EPS_ROOT + 0.25 * 7
    np.testing.assert_allclose(factors(literal, ONE_HEAD, ONE_HEAD_PARAMS)["q"].b, [[[expected]]], rtol=1e-15)


def test_g8_with_a_literal_gain_a_gate_of_one_is_the_residual_exactly():
    plain = AdapterSpec(1, hidden_dim=1, head_embed_dim=2, activation="identity", residual=True, gain=2.0)
    without = {key: value for key, value in ONE_HEAD_PARAMS.items() if key != "gate.q"}
    gated = factors(plain.replace(gate=1.0), ONE_HEAD, without | {"gate.q": np.ones(1)})
    np.testing.assert_array_equal(gated["q"].b, factors(plain, ONE_HEAD, without)["q"].b)


@pytest.mark.parametrize("gate", [0.1, 1.0, 4.0])
def test_g8_adam_s_first_step_moves_b_as_far_as_lora_s(gate):
    """One entry of B whose gradient is positive: all that it is a sum of moves by one, in its favour."""
    spec = AdapterSpec(1, residual=True, gate=gate)
    layer = LayerShape({"q": ProjectionShape(1, 1, 4)})
    moves = []
    for seed in range(50):
        params = {key: np.float64(value) for key, value in init_params(spec, layer, seed, "layer").items()}
        hidden = activation(spec.activation, params["b_in"] @ normalize(params["head_embed"][0]))
        params |= {"b_out.q": np.sign(hidden).T, "b.q": np.ones((1, 1, 1))}
        moves.append(factors(spec, layer, params)["q"].b.item())
    assert np.mean(moves) == pytest.approx(1, rel=0.05)


def test_g7_a_fixed_a_has_no_gradient_and_is_used_all_the_same():
    layer = LayerShape.attention(embed_dim=6, num_heads=2)
    fixed, free = (AdapterSpec(3, sharing="a", a_source=source) for source in ("fixed", "direct"))
    params = {key: np.ones(shape) for key, shape in param_shapes(free, layer).items()}
    cotangents = {p: np.ones((6, 6)) for p in layer}
    np.testing.assert_array_equal(delta(fixed, layer, params)["q"], delta(free, layer, params)["q"])
    of_fixed, of_free = (grads(spec, layer, params, cotangents) for spec in (fixed, free))
    assert not of_fixed["a.q"].any()
    assert of_free["a.q"].all()
    np.testing.assert_array_equal(of_fixed["b.q"], of_free["b.q"])


def test_g7_a_tied_a_learns_from_all_projections():
    layer = LayerShape.attention(embed_dim=6, num_heads=2)
    tied, apart = AdapterSpec(3, sharing="a", tie_a=True), AdapterSpec(3, sharing="a")
    rng = np.random.default_rng(0)
    cotangents = {p: rng.normal(size=(6, 6)) for p in layer}
    params = {key: rng.normal(size=shape) for key, shape in param_shapes(tied, layer).items()}
    copies = {key: value for key, value in params.items() if key != "a"} | {f"a.{p}": params["a"] for p in layer}
    of_tied, of_copies = grads(tied, layer, params, cotangents), grads(apart, layer, copies, cotangents)
    np.testing.assert_allclose(of_tied["a"], of_copies["a.q"] + of_copies["a.v"], rtol=1e-15)


def test_g8_the_generated_share_by_hand():
    shares = generated_share(GATED, ONE_HEAD, ONE_HEAD_PARAMS)
    generated, free = 6 / EPS_ROOT / np.sqrt(2 / (3 * np.pi)) / 1.5, 0.25 * 7 / 1.5
    assert shares["q"] == pytest.approx(generated**2 / (generated**2 + free**2))
    assert generated_share(AdapterSpec(1, sharing="a"), ONE_HEAD, {}) == {"q": 0.0}
    at_start = init_params(GATED, ONE_HEAD, 0, "layer")
    assert np.isnan(generated_share(GATED, ONE_HEAD, at_start)["q"])


def test_g4_a_generated_a_by_hand():
    """a_in diag(a) = (2, -6); ReLU (2, 0); a_out (1, 1), (4, 1) give A^T = gain * (2, 0), (8, 0)."""
    spec = AdapterSpec(2, hidden_dim=1, sharing="a", a_source="hypernetwork", activation="relu", gain=0.5)
    layer = LayerShape({"q": ProjectionShape(1, 1, 2)})
    params = {
        "a_seed": np.array([2.0, 3.0]),
        "a_in": np.array([[1.0, -2.0]]),
        "a_out.q": np.array([[1.0], [4.0]]),
        "b.q": np.array([[[1.0, 1.0]]]),
    }
    np.testing.assert_allclose(factors(spec, layer, params)["q"].a, [[1.0, 4.0], [0.0, 0.0]])


def test_g6_the_residual_is_added_outside_the_gain():
    spec = AdapterSpec(1, hidden_dim=1, head_embed_dim=2, gain=4.0, residual=True, activation="identity")
    layer = LayerShape({"q": ProjectionShape(1, 1, 1)})
    params = {
        "a.q": np.array([[1.0]]),
        "head_embed": np.array([[[-1.0], [1.0]]]),
        "b_in": np.array([[0.0, 1.0]]),
        "b_out.q": np.array([[1.0]]),
        "b.q": np.array([[[0.25]]]),
    }
    np.testing.assert_allclose(delta(spec, layer, params)["q"], [[4 / EPS_ROOT + 0.25]], rtol=1e-15)


def test_d2_free_factors_per_head_stack_by_rows():
    spec = AdapterSpec(1, sharing="none", alpha=3)
    layer = LayerShape({"q": ProjectionShape(2, 2, 2)})
    params = {
        "a.q": np.array([[[1.0, 2.0]], [[3.0, 4.0]]]),
        "b.q": np.array([[[1.0], [10.0]], [[100.0], [1000.0]]]),
    }
    expected = 3 * np.array([[1, 2], [10, 20], [300, 400], [3000, 4000]])
    np.testing.assert_allclose(delta(spec, layer, params)["q"], expected)


@pytest.mark.parametrize("sharing", ["full", "none"])
def test_d3_the_adapted_projection_adds_the_delta_to_the_weight(sharing):
    spec, layer, params = _drawn(AdapterSpec(2, alpha=3, sharing=sharing))
    rng = np.random.default_rng(1)
    x, weight, bias = rng.normal(size=(3, 5, 7)), rng.normal(size=(12, 7)), rng.normal(size=12)
    y = hora_linear(x, weight, bias, factors(spec, layer, params)["q"], spec.scaling)
    np.testing.assert_allclose(y, x @ (weight + delta(spec, layer, params)["q"]).T + bias, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "u", "value", "slope"),
    [
        ("leaky_relu", -2.0, -0.02, 0.01),
        ("leaky_relu", 0.0, 0.0, 0.01),
        ("relu", -2.0, 0.0, 0.0),
        ("gelu", 1.0, 0.8413447460685429, 1.0833154705876864),
        ("sigmoid", 0.0, 0.5, 0.25),
        ("tanh", 0.5, 0.46211715726000975, 0.7864477329659274),
        ("identity", -3.0, -3.0, 1.0),
    ],
)
def test_g3_activations_at_known_points(name, u, value, slope):
    assert activation(name, np.float64(u)) == pytest.approx(value, rel=1e-14)
    assert activation_slope(name, np.float64(u)) == pytest.approx(slope, rel=1e-14)


SPECS = [
    *(AdapterSpec(3, alpha=2, activation=name, a_source="hypernetwork") for name in ACTIVATIONS),
    AdapterSpec(3, residual=True),
    AdapterSpec(3, normalize=False),
    AdapterSpec(3, sharing="a"),
    AdapterSpec(3, sharing="b", gain=0.7),
    AdapterSpec(3, sharing="none"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_g7_gradients_by_central_differences(spec):
    spec, layer, params = _drawn(spec)
    rng = np.random.default_rng(2)
    cotangents = {p: rng.normal(size=shape.weight_shape) for p, shape in layer.items()}

    def loss(**changed):
        return sum((cotangents[p] * d).sum() for p, d in delta(spec, layer, params | changed).items())

    for key, gradient in grads(spec, layer, params, cotangents).items():
        numeric = np.zeros_like(gradient)
        for index in np.ndindex(gradient.shape):
            step = np.zeros_like(gradient)
            step[index] = 1e-6
            numeric[index] = (loss(**{key: params[key] + step}) - loss(**{key: params[key] - step})) / 2e-6
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-6 * abs(gradient).max(), err_msg=key)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_m1_the_sum_is_rounded_once(dtype):
    weight = np.array([[1.0, -2.0]], dtype)
    step = float(np.finfo(dtype).eps)
    change = np.array([[0.75 * step, 1.25 * step]])  # nearer to one unit in the last place than to none
    merged = merge(weight, change, Layout())
    assert merged.dtype == dtype
    np.testing.assert_array_equal(merged, [[1 + step, -2 + step]])


def test_m1_only_the_window_changes():
    weight = np.ones((6, 2), np.float32)
    merged = merge(weight, np.full((2, 2), 0.5), Layout("(h k) d", Window(0, 4, 6)))
    assert (merged[:4] == 1).all()
    assert (merged[4:] == 1.5).all()
    assert (weight == 1).all()


@pytest.mark.parametrize(
    ("change", "message"), [(np.nan, "only a finite delta"), (np.inf, "only a finite delta"), (1e30, "overflows")]
)
def test_m3_what_is_not_finite_is_not_merged(change, message):
    weight = np.ones((2, 2), np.float16)
    with pytest.raises(HoraError, match=rf"{message}.*\(spec M3\)"):
        merge(weight, np.full((2, 2), change), Layout())
    assert (weight == 1).all()


def test_s7_the_reference_refuses_unfit_parameters():
    spec, layer, params = _drawn(AdapterSpec(2))
    del params["b_in"]
    with pytest.raises(HoraError, match=r"\(spec S7\)"):
        factors(spec, layer, params)


def _drawn(spec):
    """A small grouped-query layer with every parameter drawn, none zero."""
    spec = spec.replace(hidden_dim=4, head_embed_dim=5)
    layer = LayerShape({"q": ProjectionShape(4, 3, 7), "v": ProjectionShape(2, 2, 6)})
    rng = np.random.default_rng(0)
    return spec, layer, {key: rng.normal(size=shape) for key, shape in param_shapes(spec, layer).items()}
