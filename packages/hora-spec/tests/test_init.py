"""Initialisation, pinned to the bit."""

import hashlib
import statistics

import numpy as np
import pytest
from hora_spec import ACTIVATIONS, AdapterSpec, HoraError, LayerShape, ProjectionShape, init_params, reference
from hora_spec.init import normal, raw_stream, uniform

LAYER = LayerShape.attention(64, 4, num_kv_heads=2)
SPECS = {
    "default": AdapterSpec(),
    "paper": AdapterSpec.paper(16),
    "residual": AdapterSpec(residual=True),
    "a": AdapterSpec(sharing="a", a_source="hypernetwork", activation="tanh"),
    "b": AdapterSpec(sharing="b"),
    "none": AdapterSpec(sharing="none"),
}


def test_i1_stream_is_numpys_philox_under_a_hashed_key():
    assert raw_stream(0, "blocks.0.attn", "head_embed", 3).tolist() == PINNED_RAW
    digest = hashlib.sha256(b"hora\x000\x00blocks.0.attn\x00head_embed").digest()
    stream = np.random.Philox(key=np.frombuffer(digest[:16], "<u8"), counter=0)
    assert stream.random_raw(3).tolist() == PINNED_RAW


def test_i1_philox_is_the_published_function():
    """Philox 4x64-10 of Random123, written out: ten rounds on the counter under the key."""

    def philox(counter, key):
        mask = 2**64 - 1
        for _ in range(10):
            low, high = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
            counter = [(high >> 64) ^ counter[1] ^ key[0], high & mask, (low >> 64) ^ counter[3] ^ key[1], low & mask]
            key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
        return counter

    digest = hashlib.sha256(b"hora\x007\x00layer\x00a.q").digest()
    key = np.frombuffer(digest[:16], "<u8").tolist()
    expected = philox([1, 0, 0, 0], key) + philox([2, 0, 0, 0], key)
    assert raw_stream(7, "layer", "a.q", 8).tolist() == expected


@pytest.mark.parametrize("seed", [-1, 0.5, "0", None, True])
def test_i1_seeds_are_natural_numbers(seed):
    with pytest.raises(HoraError, match=r"seed must be an integer of at least 0.*\(spec I1\)"):
        init_params(AdapterSpec(), LAYER, seed, "layer")


@pytest.mark.parametrize("name", ["", None, "a\0b", 3])
def test_i1_layer_names_are_text_without_nul(name):
    with pytest.raises(HoraError, match=r"layer name.*\(spec I1\)"):
        init_params(AdapterSpec(), LAYER, 0, name)


def test_i2_uniforms_are_exact_and_open():
    raw = np.array([0, 2**12 - 1, 2**12, 2**63, 2**64 - 1], np.uint64)
    assert uniform(raw).tolist() == [2**-53, 2**-53, 3 * 2**-53, 0.5 + 2**-53, 1 - 2**-53]


def test_i3_normals_agree_with_the_standard_library():
    raw = np.concatenate([raw_stream(0, "layer", "x", 4000), np.array([0, 2**40, 2**64 - 1], np.uint64)])
    inverse = statistics.NormalDist().inv_cdf
    assert normal(raw) == pytest.approx([inverse(u) for u in uniform(raw)], rel=1e-13)


def test_i3_normals_are_pinned_to_the_bit_in_the_middle_and_in_both_tails():
    raw = np.array([2**63 + 2**60, 2**58, 2**64 - 2**50, 2**20], np.uint64)
    assert [x.hex() for x in normal(raw).tolist()] == PINNED_NORMALS


@pytest.mark.parametrize("name", SPECS)
def test_i4_the_start_leaves_the_base_unchanged(name):
    params = init_params(SPECS[name], LAYER, 0, "layer")
    for delta in reference.delta(SPECS[name], LAYER, params).values():
        assert (delta == 0).all()
    assert all(value.dtype == np.float32 for value in params.values())


@pytest.mark.parametrize("name", SPECS)
def test_i1_initial_values_are_pinned_to_the_bit(name):
    params = init_params(SPECS[name], LAYER, 3, "blocks.0.attn")
    digest = hashlib.sha256()
    for key, value in params.items():
        digest.update(key.encode() + value.tobytes())
    assert digest.hexdigest()[:16] == PINNED_PARAMS[name]


@pytest.mark.parametrize("rank", [2, 64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gain", ["transfer", 1.0])
def test_i5_a_generated_a_has_the_variance_of_a_direct_one(activation, gain, rank):
    spec = AdapterSpec(rank, hidden_dim=64, a_source="hypernetwork", activation=activation, gain=gain)
    layer = LayerShape({"q": ProjectionShape(2, 8, 300)})
    starts = [init_params(spec, layer, seed, "layer") for seed in range(40)]
    values = np.concatenate([reference.factors(spec, layer, start)["q"].a.ravel() for start in starts])
    assert values.var() * 3 * 300 == pytest.approx(1, rel=0.1)


def test_i4_a_gate_starts_where_the_spec_says():
    params = init_params(AdapterSpec(2, residual=True, gate=0.1), LAYER, 0, "layer")
    assert params["gate.v"].tobytes() == np.float32([0.1]).tobytes()


def test_i5_a_tied_or_fixed_a_is_drawn_like_a_direct_one():
    direct, fixed = (init_params(AdapterSpec(2, sharing="a", a_source=s), LAYER, 0, "x") for s in ("direct", "fixed"))
    assert direct["a.q"].tobytes() == fixed["a.q"].tobytes()
    tied = init_params(AdapterSpec(64, sharing="a", tie_a=True), LAYER, 0, "x")["a"]
    assert 0.9 / np.sqrt(tied.shape[1]) < np.abs(tied).max() <= np.float32(1 / np.sqrt(tied.shape[1]))


def test_i5_bounds_of_the_uniform_parameters():
    spec = AdapterSpec(16, a_source="hypernetwork")
    params = init_params(spec, LAYER, 0, "layer")
    for key, bound in {"a_in": 16**-0.5, "b_in": 40**-0.5}.items():
        assert 0.98 * bound < abs(params[key]).max() <= np.float32(bound)
    direct = init_params(AdapterSpec(16), LAYER, 0, "layer")["a.q"]
    assert 0.98 / 8 < abs(direct).max() <= 1 / 8


def test_i6_layers_and_parameters_do_not_depend_on_each_other():
    spec = AdapterSpec()
    first, again, other = (init_params(spec, LAYER, 0, name) for name in ("l.0", "l.0", "l.1"))
    wider = init_params(spec, LayerShape.attention(64, 4, num_kv_heads=2, targets=("q", "k", "v")), 0, "l.0")
    for key, value in first.items():
        assert (value == again[key]).all()
        assert (value == wider[key]).all()
        assert not value.any() or (value != other[key]).mean() > 0.99
    assert (init_params(spec, LAYER, 1, "l.0")["a.q"] != first["a.q"]).mean() > 0.99


PINNED_RAW = [6879982777923162238, 4727718130560263073, 10350094501531160203]
PINNED_NORMALS = ["0x1.422c1aadb249dp-3", "-0x1.13b22a7d56855p+1", "0x1.ebc4627bdda15p+1", "-0x1.db1d990cf8180p+2"]
PINNED_PARAMS = {
    "default": "fc8ffc4667f3f5b7",
    "paper": "4fd97872fb4b227a",
    "residual": "8a70cfc0ed5aca06",
    "a": "2c8f8655cdc99f45",
    "b": "7e5ac38bbac6f6e8",
    "none": "ee78fd8f9ae22594",
}
