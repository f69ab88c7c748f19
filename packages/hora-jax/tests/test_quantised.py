"""Quantised bases: trained as QLoRA, in place of deltas added to integer codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from hora_jax import Target, adapt, init, make_plan, merge, presets
from hora_jax.nnx import HoraModel, HoraParam
from hora_spec import AdapterSpec, HoraError
from jax import lax

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # qwix 0.1.8 calls old names of flax
KINDS = {"int8": None, "int4": None, "nf4": 16}
"""Types of qwix, and tile sizes along the embed axis."""


def base() -> nnx.Module:
    return nnx.Sequential(nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0)))


def quantised(model: nnx.Module, kind: str, x: jax.Array) -> nnx.Module:
    rule = qwix.QuantizationRule(module_path=".*(query|value)", weight_qtype=kind, tile_size=KINDS[kind])
    return qwix.quantize_model(model, qwix.PtqProvider([rule]), x)


def dequantised(model: nnx.Module, codes: nnx.Module) -> nnx.Module:
    plain = nnx.clone(model)
    for name in ("query", "value"):
        kernel = qwix.dequantize(getattr(codes.layers[0], name).kernel.array)
        getattr(plain.layers[0], name).kernel.set_value(kernel)
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_trained_as_its_dequantised_weights_are(kind, method, perturbed):
    x = jax.random.normal(jax.random.key(0), (2, 5, 32))
    model = base()
    codes = quantised(model, kind, x)
    planned = make_plan(codes, method, presets.attention())
    phi = perturbed(init(planned))
    adapted = HoraModel(codes, planned, phi, dense="error")
    plain = dequantised(model, codes)
    loss = lambda m, x: jnp.mean(jnp.square(m(x)))  # noqa: E731
    np.testing.assert_allclose(adapted(x), merge(planned, plain, phi)(x), rtol=1e-4, atol=1e-5)
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, HoraParam))(adapted, x)
    expected = jax.grad(lambda phi: loss(merge(planned, plain, phi), x))(phi)
    for key, params in expected.items():
        for name, value in params.items():
            np.testing.assert_allclose(grads["phi"][key][name][...], value, rtol=1e-3, atol=1e-5)
    with pytest.raises(HoraError, match=r"dequantise it first, or write hora_jax\.export_lora"):
        adapted.merged()


@pytest.mark.parametrize("how", ["normalised", "two scales", "as activations"])
def test_codes_that_cannot_be_followed_are_refused(how, method):
    params = {"w": {"array": {"qvalue": jnp.ones((16, 4, 4), "int8"), "scale": jnp.ones((1, 4, 4))}}}
    planned = make_plan(params, method, Target("w", "q", "d h k", layer="a"))

    def fn(p, x):
        codes, scale = p["w"]["array"]["qvalue"], p["w"]["array"]["scale"]
        if how == "as activations":
            return jnp.einsum("bd,dhk->bhk", x.astype("int8"), codes, preferred_element_type="int32") * scale
        w = codes.astype("float32") * scale
        return jnp.einsum("bd,dhk->bhk", x, w * scale if how == "two scales" else w / jnp.linalg.norm(w))

    with pytest.raises(HoraError, match="through one scale"):
        adapt(fn, planned)(params, init(planned), jnp.ones((2, 16)))


def test_an_integer_leaf_of_unknown_scale_is_not_planned(method):
    with pytest.raises(HoraError, match="w of dtype int8, whose scale is unknown"):
        make_plan({"w": jnp.ones((16, 4, 4), "int8")}, method, Target("w", "q", "d h k", layer="a"))


def test_eight_bit_floats_are_adapted_and_not_merged_into(perturbed):
    params = {"w": (jax.random.normal(jax.random.key(0), (16, 4, 4)) / 4).astype("float8_e4m3fn")}
    planned = make_plan(params, AdapterSpec(4), Target("w", "q", "d h k", layer="a"))
    phi, x = perturbed(init(planned)), jax.random.normal(jax.random.key(1), (3, 16))
    fn = lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"].astype("float32"))  # noqa: E731
    wide = {"w": params["w"].astype("float32")}
    np.testing.assert_allclose(
        adapt(fn, planned, dense="error")(params, phi, x), fn(merge(planned, wide, phi), x), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(HoraError, match="float8_e4m3fn"):
        merge(planned, params, phi)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: jnp.tanh(p["w"]),
        lambda p, x: lax.dot_general(x.astype("float8_e4m3fn"), p["w"], (((1,), (0,)), ((), ()))),
    ],
)
def test_eight_bits_are_too_few_for_a_delta_or_its_factors(fn):
    params = {"w": jnp.ones((16, 4, 4), "float8_e4m3fn")}
    planned = make_plan(params, AdapterSpec(4), Target("w", "q", "d h k", layer="a"))
    with pytest.raises(HoraError, match="dequantise this weight"):
        adapt(fn, planned)(params, init(planned), jnp.ones((3, 16)))


def test_eight_bit_activations_meet_the_sum_of_a_wider_weight_and_its_delta(perturbed):
    params = {"w": jax.random.normal(jax.random.key(0), (16, 4, 4)).astype("bfloat16")}
    planned = make_plan(params, AdapterSpec(4), Target("w", "q", "d h k", layer="a"))
    phi, x = perturbed(init(planned)), jax.random.normal(jax.random.key(1), (3, 16)).astype("float8_e4m3fn")

    def fn(p, x):
        return lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type="float32")

    adapted = adapt(fn, planned)
    np.testing.assert_array_equal(adapted(params, phi, x), fn(merge(planned, params, phi), x))
    assert len(adapted.report(params, phi, x).dense) == 1
