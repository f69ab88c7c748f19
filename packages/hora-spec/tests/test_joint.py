"""The joint start of A, against the singular value decomposition of gradients that are known whole."""

import numpy as np
import pytest
from hora_spec import AdapterSpec, HoraError, LayerShape, Measure, Moments, ProjectionShape, joint_start

SPEC = AdapterSpec(3, sharing="a", a_source="fixed")
LAYER = LayerShape.attention(embed_dim=24, num_heads=4, num_kv_heads=2)
TOKENS = 64


class Problem:
    """Gradients and inputs of layers, whole, with a clear spectrum; counts the passes."""

    def __init__(self, layers, seed=0):
        rng = np.random.default_rng(seed)
        self.passes = []
        self.gradient, self.x = {}, {}
        for name, layer in layers.items():
            embed = next(iter(layer.values())).embed_dim
            directions = np.linalg.qr(rng.normal(size=(embed, embed)))[0]
            strength = np.diag(0.6 ** np.arange(embed))
            self.gradient[name] = {
                p: rng.normal(size=(shape.weight_shape[0], embed)) @ strength @ directions.T
                for p, shape in layer.items()
            }
            self.x[name] = rng.normal(size=(TOKENS, embed)) @ np.diag(np.linspace(0.2, 3, embed))

    def measure(self):
        def left(probes):
            self.passes.append("left")
            return {n: {p: q.T @ self.gradient[n][p] for p, q in layer.items()} for n, layer in probes.items()}

        def right(probes):
            self.passes.append("right")
            return {n: {p: self.gradient[n][p] @ q.T for p, q in layer.items()} for n, layer in probes.items()}

        def inputs(probes):
            self.passes.append("inputs")
            return {
                n: {
                    p: Moments(q @ self.x[n].T @ self.x[n] / TOKENS, (self.x[n] ** 2).sum() / TOKENS)
                    for p, q in d.items()
                }
                for n, d in probes.items()
            }

        return Measure(left, right, inputs)

    def stacked(self, name, projections):
        return np.concatenate([self.gradient[name][p] for p in projections])


@pytest.fixture
def problem():
    return Problem({"attn": LAYER})


def rows(matrix, rank=3):
    return np.linalg.svd(matrix)[2][:rank]


def projector(a):
    basis = np.linalg.qr(np.asarray(a, np.float64).T)[0]
    return basis @ basis.T


def test_i7_it_is_the_span_of_the_first_right_singular_vectors(problem):
    start = joint_start({"attn": (SPEC, LAYER)}, problem.measure())
    assert problem.passes == ["left", "right", "left", "right", "inputs"]
    for p in LAYER:
        a = start.params["attn"][f"a.{p}"]
        assert (a.dtype, a.shape) == (np.float32, (3, 24))
        exact = rows(problem.gradient["attn"][p])
        np.testing.assert_allclose(projector(a), projector(exact), atol=1e-4)
        spectrum = np.linalg.svd(problem.gradient["attn"][p])[1]
        np.testing.assert_allclose(start.spectra["attn"][f"a.{p}"][:3], spectrum[:3], rtol=1e-4)


def test_i7_heads_are_judged_together_not_one_by_one(problem):
    """A basis of the first head alone is another one."""
    a = joint_start({"attn": (SPEC, LAYER)}, problem.measure()).params["attn"]["a.q"]
    alone = projector(rows(problem.gradient["attn"]["q"][:6]))
    assert np.abs(projector(a) - alone).max() > 0.05


@pytest.mark.parametrize(
    ("spec", "options", "key"), [(SPEC, {"together": True}, "a.v"), (SPEC.replace(tie_a=True), {}, "a")]
)
def test_i7_together_or_tied_all_projections_are_stacked(problem, spec, options, key):
    start = joint_start({"attn": (spec, LAYER)}, problem.measure(), **options)
    np.testing.assert_allclose(
        projector(start.params["attn"][key]), projector(rows(problem.stacked("attn", LAYER))), atol=1e-4
    )
    assert len({a.tobytes() for a in start.params["attn"].values()}) == 1


def test_i7_of_inputs_takes_their_principal_directions_without_gradients(problem):
    start = joint_start({"attn": (SPEC, LAYER)}, problem.measure(), of="inputs", power=8)
    assert set(problem.passes) == {"inputs"}
    np.testing.assert_allclose(projector(start.params["attn"]["a.q"]), projector(rows(problem.x["attn"])), atol=1e-3)


def test_i7_by_kaiming_the_output_of_a_has_lora_s_mean_square(problem):
    a = joint_start({"attn": (SPEC, LAYER)}, problem.measure()).params["attn"]["a.q"]
    x = problem.x["attn"]
    assert ((x @ a.T) ** 2).sum(1).mean() == pytest.approx(3 * (x**2).sum(1).mean() / (3 * 24), rel=1e-5)


def test_i7_by_rows_every_row_has_a_kaiming_row_s_norm(problem):
    a = joint_start({"attn": (SPEC, LAYER)}, problem.measure(), scale="rows").params["attn"]["a.q"]
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 3**-0.5, rtol=1e-6)
    assert "inputs" not in problem.passes


def test_i7_signs_are_those_of_the_largest_entries(problem):
    a = joint_start({"attn": (SPEC, LAYER)}, problem.measure()).params["attn"]["a.q"]
    assert (np.take_along_axis(a, np.abs(a).argmax(1)[:, None], 1) > 0).all()
    for p in LAYER:
        problem.gradient["attn"][p] *= -1
    again = joint_start({"attn": (SPEC, LAYER)}, problem.measure()).params["attn"]["a.q"]
    np.testing.assert_allclose(again, a, rtol=1e-4, atol=1e-6)


def test_i7_float32_s_rounding_of_products_moves_it_little(problem):
    honest = problem.measure()

    def rounded(function):
        return lambda probes: {n: {p: v.astype(np.float32) for p, v in d.items()} for n, d in function(probes).items()}

    one = joint_start({"attn": (SPEC, LAYER)}, honest).params["attn"]
    other = joint_start(
        {"attn": (SPEC, LAYER)}, honest._replace(left=rounded(honest.left), right=rounded(honest.right))
    )
    for key, a in other.params["attn"].items():
        np.testing.assert_allclose(projector(a), projector(one[key]), atol=1e-5)


def test_i7_layers_do_not_depend_on_each_other():
    both = {"first": LAYER, "second": LayerShape.attention(embed_dim=12, num_heads=3)}
    problem = Problem(both)
    together = joint_start({name: (SPEC, layer) for name, layer in both.items()}, problem.measure())
    alone = joint_start({"second": (SPEC, both["second"])}, problem.measure())
    np.testing.assert_array_equal(together.params["second"]["a.q"], alone.params["second"]["a.q"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: 0 * g, "0 clear directions"),
        (lambda g: np.outer(np.ones(len(g)), np.arange(g.shape[1])), "1 clear directions"),
        (lambda g: np.full_like(g, np.nan), "NaN or infinity"),
    ],
)
def test_i7_a_gradient_without_enough_directions_is_refused(problem, change, message):
    problem.gradient["attn"]["v"] = change(problem.gradient["attn"]["v"])
    with pytest.raises(HoraError, match=rf"{message}.*\(spec I7\)"):
        joint_start({"attn": (SPEC, LAYER)}, problem.measure())


@pytest.mark.parametrize(
    "spec",
    [AdapterSpec(3, sharing="none"), AdapterSpec(3, sharing="b"), AdapterSpec.paper(3)],
    ids=["none", "b", "generated"],
)
def test_i7_an_a_that_is_generated_or_per_head_has_no_joint_start(problem, spec):
    with pytest.raises(HoraError, match=r"which heads share.*\(spec I7\)"):
        joint_start({"attn": (spec, LAYER)}, problem.measure())


def test_i7_a_rank_above_the_gradient_s_size_is_refused(problem):
    with pytest.raises(HoraError, match=r"12 rows and 24 columns has no 13 directions.*\(spec I7\)"):
        joint_start({"attn": (SPEC.replace(rank=13), LAYER)}, problem.measure())


@pytest.mark.parametrize("options", [{"of": "weights"}, {"scale": "big"}])
def test_i7_options_are_listed(problem, options):
    with pytest.raises(HoraError, match=r"must be one of .*\(spec I7\)"):
        joint_start({"attn": (SPEC, LAYER)}, problem.measure(), **options)


def test_s8_one_basis_needs_one_width():
    uneven = LayerShape({"q": ProjectionShape(2, 3, 6), "v": ProjectionShape(2, 3, 8)})
    with pytest.raises(HoraError, match=r"equal input widths.*\(spec S8\)"):
        joint_start({"attn": (SPEC, uneven)}, Problem({"attn": LAYER}).measure(), together=True)
