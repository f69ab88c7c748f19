import numpy as np
import pytest
from hora_bench.experiments.similarity.measures import (
    cosines_of_b,
    cosines_of_delta,
    measure,
    participation_ratio,
    shares_of,
    singular_values,
    start,
)
from hora_spec import AdapterSpec, Factors, LayerShape, generated_share


def draw(*, heads=3, head_dim=5, rank=2, embed=7, own_a=False):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(heads, rank, embed) if own_a else (rank, embed))
    return Factors(a, rng.normal(size=(heads, head_dim, rank)))


def dense(factors):
    a = np.broadcast_to(factors.a, (len(factors.b), *factors.a.shape[-2:]))
    return factors.b @ a


@pytest.mark.parametrize("own_a", [False, True])
def test_cosines_of_updates_are_those_of_the_dense_updates(own_a):
    factors = draw(own_a=own_a)
    flat = dense(factors).reshape(len(factors.b), -1)
    norms = np.linalg.norm(flat, axis=1)
    np.testing.assert_allclose(cosines_of_delta(factors), flat @ flat.T / np.outer(norms, norms), rtol=1e-12)


def test_the_basis_changes_the_cosines_of_b_but_not_of_updates():
    factors, basis = draw(), np.array([[1.0, 3.0], [0.0, 2.0]])
    other = Factors(np.linalg.solve(basis, factors.a), factors.b @ basis)
    np.testing.assert_allclose(cosines_of_delta(other), cosines_of_delta(factors), rtol=1e-9)
    assert not np.allclose(cosines_of_b(other), cosines_of_b(factors))


def test_equal_and_opposite_heads():
    one = np.random.default_rng(1).normal(size=(5, 2))
    factors = Factors(draw().a, np.stack([one, 2 * one, -one]))
    expected = np.array([[1, 1, -1], [1, 1, -1], [-1, -1, 1]])
    np.testing.assert_allclose(cosines_of_b(factors), expected, atol=1e-12)
    np.testing.assert_allclose(cosines_of_delta(factors), expected, atol=1e-12)


@pytest.mark.parametrize(("own_a", "values"), [(False, 2), (True, 6)])
def test_singular_values_are_those_of_the_stacked_update(own_a, values):
    factors = draw(own_a=own_a)
    rows = dense(factors).reshape(-1, factors.a.shape[-1])
    found = singular_values(factors)
    assert len(found) == values
    np.testing.assert_allclose(found, np.linalg.svd(rows, compute_uv=False)[:values], rtol=1e-10)


@pytest.mark.parametrize(("values", "ratio"), [([3.0, 3.0, 3.0], 3), ([2.0, 0.0], 1), ([0.0, 0.0], 0)])
def test_participation_ratio_counts_directions(values, ratio):
    assert participation_ratio(np.array(values)) == pytest.approx(ratio)


def test_an_update_of_zero_is_alike_to_nothing():
    found = measure(Factors(draw().a, np.zeros((3, 5, 2))))
    assert (found["participation_ratio"], found["mean_cosine_b"], found["mean_cosine_delta"]) == (0, 0, 0)


def test_leaky_relu_collapses_the_start_and_tanh_does_not():
    layer = LayerShape.attention(96, 6)
    specs = {name: AdapterSpec(8, a_source="hypernetwork", activation=name) for name in ("leaky_relu", "tanh")}
    ratio = {name: start(spec, layer, draws=4)["participation_ratio"] for name, spec in specs.items()}
    free = start(AdapterSpec(8, sharing="a"), layer, draws=4)["participation_ratio"]
    assert ratio["leaky_relu"] < 2.5 < 5 < ratio["tanh"] < free


@pytest.mark.parametrize("fields", [{"residual": True}, {"residual": True, "gate": 0.5}])
def test_what_heads_share_is_what_the_report_of_the_model_says(fields):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    hora_torch, peft = pytest.importorskip("hora_torch"), pytest.importorskip("peft")
    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    torch.manual_seed(0)
    base = timm.models.vision_transformer.VisionTransformer(**sizes)
    config = hora_torch.HoraConfig(r=2, hidden_dim=6, head_embed_dim=5, init_weights=False, **fields)
    model = peft.get_peft_model(base, config)
    shares = shares_of(model)
    assert shares.keys() == {(layer, p) for layer in range(2) for p in "qv"}
    for number, layer in enumerate(hora_torch.to_adapter(model).layers.values()):
        for p, share in generated_share(layer.spec, layer.shape, layer.params).items():
            assert shares[number, p] == pytest.approx(share)
            assert 0 < share < 1


def test_nothing_is_said_of_sharing_where_nothing_is_free():
    torch, hora_torch = pytest.importorskip("torch"), pytest.importorskip("hora_torch")
    base = torch.nn.ModuleDict({"blocks": torch.nn.Sequential(torch.nn.Linear(8, 8))})
    config = hora_torch.HoraConfig(r=2, target_modules=["blocks.0"], num_heads=2)
    assert shares_of(pytest.importorskip("peft").get_peft_model(base, config)) == {}
