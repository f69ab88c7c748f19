"""`AdapterSpec`: domains, consistency, gains."""

import dataclasses
import math

import numpy as np
import pytest
from hora_spec import ACTIVATIONS, AdapterSpec, HoraError
from hora_spec.activations import mean_abs_normal, mean_abs_uniform, mean_square_uniform
from hora_spec.reference import activation


@pytest.mark.parametrize("field", ["rank", "hidden_dim", "head_embed_dim"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "8", True, None, math.nan])
def test_s1_widths_are_positive_integers(field, value):
    with pytest.raises(HoraError, match=rf"{field} must be an integer of at least 1, got .* \(spec S1\)"):
        AdapterSpec(**{field: value})


def test_s1_numpy_integers_become_python_integers():
    spec = AdapterSpec(np.int64(4))
    assert type(spec.rank) is int


@pytest.mark.parametrize("field", ["alpha", "gain", "gate"])
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "big", True])
def test_s1_alpha_gain_and_gate_are_finite_and_positive(field, value):
    with pytest.raises(HoraError, match=rf"{field} must be a finite number above 0.*\(spec S1\)"):
        AdapterSpec(**{field: value}, residual=field == "gate")


@pytest.mark.parametrize(
    ("field", "value"), [("sharing", "q"), ("activation", "swish"), ("a_source", "free"), ("residual", 1)]
)
def test_s1_choices_are_listed_in_the_message(field, value):
    with pytest.raises(HoraError, match=rf"{field} must be .*got {value!r} \(spec S1\)"):
        AdapterSpec(**{field: value})


def test_s1_the_papers_reading():
    spec = AdapterSpec.paper(32)
    assert (spec.rank, spec.hidden_dim, spec.head_embed_dim, spec.gain) == (32, 20, 20, 1.0)
    assert spec.generates_a
    assert spec.generates_b
    assert spec.scaling == 1.0


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"sharing": "b", "a_source": "hypernetwork"}, "a_source"),
        ({"sharing": "none", "a_source": "hypernetwork"}, "a_source"),
        ({"sharing": "a", "residual": True}, "residual"),
        ({"sharing": "none", "residual": True}, "residual"),
        ({"sharing": "none", "gain": 1.0}, "gain"),
        ({"sharing": "a", "gain": 1.0}, "gain"),
        ({"head_embed_dim": 1}, "head_embed_dim"),
        ({"gate": 0.5}, "residual"),
        ({"tie_a": True, "sharing": "b"}, "tie_a"),
        ({"tie_a": True, "a_source": "hypernetwork"}, "tie_a"),
        ({"a_source": "fixed", "sharing": "a", "residual": True}, "residual"),
        ({"a_source": "fixed", "sharing": "a", "gain": 1.0}, "gain"),
    ],
)
def test_s2_contradictions_are_refused(fields, cause):
    with pytest.raises(HoraError, match=rf"{cause}.*\(spec S2\)"):
        AdapterSpec(**fields)


@pytest.mark.parametrize(
    ("sharing", "a_source", "generates"),
    [
        ("full", "direct", (False, True)),
        ("full", "hypernetwork", (True, True)),
        ("a", "direct", (False, False)),
        ("a", "hypernetwork", (True, False)),
        ("b", "direct", (False, True)),
        ("none", "direct", (False, False)),
    ],
)
def test_s2_sharing_decides_what_is_generated(sharing, a_source, generates):
    spec = AdapterSpec(sharing=sharing, a_source=a_source)
    assert (spec.generates_a, spec.generates_b) == generates


def test_s2_one_long_embedding_is_fine_where_nothing_normalises_it():
    assert AdapterSpec(head_embed_dim=1, normalize=False).head_embed_dim == 1
    assert AdapterSpec(head_embed_dim=1, sharing="none").head_embed_dim == 1


def test_d1_scaling_is_alpha_over_rank():
    assert AdapterSpec(8, alpha=16).scaling == 2.0
    assert AdapterSpec(8).scaling == 1.0


def test_specs_are_immutable_and_survive_a_round_trip():
    spec = AdapterSpec(4, alpha=2, activation="tanh", gain=0.5, residual=True)
    assert AdapterSpec.from_dict(spec.to_dict()) == spec
    assert spec.replace(rank=2).rank == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.rank = 3
    with pytest.raises(HoraError, match="got also"):
        AdapterSpec.from_dict({**spec.to_dict(), "heat": 1})


def _mean_uniform(f, c):
    """Mean over U(-c, c) by Gauss-Legendre on both sides of the kink at zero."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    half = c * (nodes + 1) / 2
    return float(weights @ (f(half) + f(-half))) / 4


def _mean_normal(f, sigma):
    nodes, weights = np.polynomial.legendre.leggauss(200)
    half = 12 * sigma * (nodes + 1) / 2
    density = np.exp(-(half**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    return float(weights @ (density * (f(half) + f(-half)))) * 6 * sigma


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_g5_mean_of_the_activation_over_normals_by_quadrature(name):
    measured = _mean_normal(lambda u: abs(activation(name, u)), math.sqrt(1 / 3))
    assert mean_abs_normal(name) == pytest.approx(measured, rel=1e-13)


@pytest.mark.parametrize("bound", [1.0, 8**-0.5, 1 / 16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_g5_mean_of_the_activation_over_uniforms_by_quadrature(name, bound):
    measured = _mean_uniform(lambda u: abs(activation(name, u)), bound)
    assert mean_abs_uniform(name, bound) == pytest.approx(measured, rel=1e-12)


@pytest.mark.parametrize("bound", [1.0, 8**-0.5, 1 / 16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_i5_mean_square_of_the_activation_by_quadrature(name, bound):
    measured = _mean_uniform(lambda u: activation(name, u) ** 2, bound)
    assert mean_square_uniform(name, bound) == pytest.approx(measured, rel=1e-10)


def test_g5_transfer_gain_of_the_default():
    spec = AdapterSpec(8, a_source="hypernetwork")
    assert spec.gain_b == pytest.approx(1 / (40 * 0.505 * math.sqrt(2 / (3 * math.pi))))
    assert spec.gain_a == pytest.approx(1 / (40 * 0.505 / 2 / math.sqrt(8)))
    assert (AdapterSpec(gain=0.5).gain_a, AdapterSpec(gain=0.5).gain_b) == (0.5, 0.5)
