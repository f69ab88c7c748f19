"""Every preset on the model it is for: names, head counts, and adapted equals merged."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hora_jax import init, make_plan, merge, presets
from hora_jax.nnx import HoraModel
from hora_spec import HoraError, ProjectionShape, Window

TOKENS = np.arange(10).reshape(2, 5)
IMAGES = np.linspace(-1, 1, 2 * 16 * 16 * 3, dtype="float32").reshape(2, 16, 16, 3)


def close(a, b) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_llama(make_llama, method, perturbed, scan, remat):
    base = make_llama(scan_layers=scan, remat=remat)
    planned = make_plan(base, method, presets.llama("qkv"))
    names = [name for layer in planned.layers for name in layer.names]
    assert names == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert planned.layers[0].shape["v"] == ProjectionShape(2, 4, 16)
    model = HoraModel(base, planned, perturbed(init(planned)))
    close(model(TOKENS), model.merged()(TOKENS))


@pytest.mark.parametrize("scan", [False, True])
def test_llama_with_a_key_value_cache(make_llama, method, perturbed, scan):
    base = make_llama(scan_layers=scan)
    planned = make_plan(base, method, presets.llama())
    model, cache, logits = HoraModel(base, planned, perturbed(init(planned))), base.init_cache(2, 5), []
    step = nnx.jit(lambda m, token, cache: m(token, cache=cache))
    for i in range(5):
        out, cache = step(model, TOKENS[:, i : i + 1], cache)
        logits.append(out)
    close(jnp.concatenate(logits, 1), model(TOKENS))


def test_head_counts_of_parameters_alone_are_given(make_llama, method):
    state = nnx.state(make_llama())
    with pytest.raises(HoraError, match="plan the model itself"):
        make_plan(state, method, presets.llama())
    planned = make_plan(state, method, presets.llama(num_heads=4, num_kv_heads=2))
    assert planned == make_plan(make_llama(), method, presets.llama())


@pytest.mark.parametrize("scan", [False, True])
def test_vit(make_vit, method, perturbed, scan):
    base = make_vit(scan_layers=scan)
    planned = make_plan(base, method, presets.vit())
    assert [name for layer in planned.layers for name in layer.names] == ["blocks.0.attn", "blocks.1.attn"]
    rows = [(site.projection, site.layout.window) for layer in planned.layers for site in layer.sites]
    assert rows == [("q", Window(1 + scan, 0, 16)), ("v", Window(1 + scan, 32, 48))] * (1 if scan else 2)
    model = HoraModel(base, planned, perturbed(init(planned)))
    close(model(IMAGES), model.merged()(IMAGES))


def test_linen_attention(method, perturbed, x):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.MultiHeadDotProductAttention(num_heads=4)(x, x)
            return x

    variables = Net().init(jax.random.key(0), x)
    planned = make_plan(variables, method, presets.attention())
    assert [layer.name for layer in planned.layers] == [f"params.MultiHeadDotProductAttention_{i}" for i in range(2)]
    merged = merge(planned, variables, perturbed(init(planned)))
    assert not jnp.allclose(Net().apply(merged, x), Net().apply(variables, x))


@pytest.mark.parametrize("axis", [0, 1])
def test_linen_attention_scanned_over_layers(method, perturbed, x, axis):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.MultiHeadDotProductAttention(num_heads=4, use_bias=False, name="attn")(x, x), None

    net = nn.scan(Layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=3)()
    variables = net.init(jax.random.key(0), x, None)
    planned = make_plan(variables, method, presets.attention(stack_axis=axis))
    assert planned.layers[0].names == tuple(f"params.attn.{i}" for i in range(3))
    merged = merge(planned, variables, perturbed(init(planned)))
    assert not jnp.allclose(net.apply(merged, x, None)[0], net.apply(variables, x, None)[0])


def test_equinox_attention(method, perturbed, x):
    class Net(eqx.Module):
        layers: list

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x, x, x)
            return x

    net = Net([eqx.nn.MultiheadAttention(4, 16, key=jax.random.key(i)) for i in range(2)])
    planned = make_plan(net, method, presets.equinox("qkv"))
    assert [layer.name for layer in planned.layers] == ["layers.0", "layers.1"]
    assert planned.layers[0].shape["k"] == ProjectionShape(4, 4, 16)
    merged = merge(planned, net, perturbed(init(planned)))
    assert not jnp.allclose(merged(x[0]), net(x[0]))


def test_tunix_fused_weights_are_told_apart_and_named_as_in_a_model_that_also_sees(method):
    """Without tunix: the names and shapes of its Gemma; test_tunix.py runs its models."""
    shapes = {"q_einsum": (4, 16, 4), "kv_einsum": (2, 2, 16, 4)}
    attention = {name: {"w": jax.ShapeDtypeStruct(shape, "float32")} for name, shape in shapes.items()}
    planned = make_plan({"layers": [{"attn": attention}]}, method, presets.tunix(layers="model.language_model.layers"))
    (layer,) = planned.layers
    assert layer.name == "model.language_model.layers.0.self_attn"
    assert [(s.projection, s.module, s.path) for s in layer.sites] == [
        ("q", "q_proj", "layers.0.attn.q_einsum.w"),
        ("v", "v_proj", "layers.0.attn.kv_einsum.w"),
    ]
    assert layer.sites[1].layout.window == Window(0, 1, 2)


@pytest.mark.parametrize("block", [None, 2])
def test_maxtext(method, block):
    """Stacked along the second axis, a step of the scan being a layer or a block of two; or layer by layer."""
    apart, stacked = jax.ShapeDtypeStruct((16, 4, 4), "float32"), jax.ShapeDtypeStruct((16, 3, 4, 4), "float32")
    attention = {"self_attention": {name: {"kernel": stacked} for name in ("query", "key", "value")}}
    params = {"params": {"decoder": {"layers": {f"layers_{i}": attention for i in range(2)} if block else attention}}}
    planned = make_plan(params, method, presets.maxtext("qv", block=block))
    names = [name for layer in planned.layers for name in layer.names]
    depth = 3 * (block or 1)
    assert sorted(names) == [f"params.decoder.layers_{i}.self_attention" for i in range(depth)]
    assert {site.layout.pattern for layer in planned.layers for site in layer.sites} == {"d l h k"}

    own = {"self_attention": {name: {"kernel": apart} for name in ("query", "value")}}
    unrolled = {"params": {"decoder": {f"layers_{i}": own for i in range(depth)}}}
    again = make_plan(unrolled, method, presets.maxtext("qv"))
    assert sorted(layer.name for layer in again.layers) == sorted(names)
    assert all(list(layer.shape) == ["q", "v"] for layer in (*planned.layers, *again.layers))


def test_maxtext_with_layers_that_remain_after_the_scan(method):
    own = {"self_attention": {name: {"kernel": jnp.zeros((16, 4, 4))} for name in ("query", "value")}}
    stacked = jax.tree.map(lambda w: jnp.stack([w, w], 1), own)
    params = {"decoder": {"layers": {"layers_0": stacked}, "layers_remainder": {"layers_0": own}}}
    planned = make_plan(params, method, presets.maxtext(block=1))
    names = {name for layer in planned.layers for name in layer.names}
    assert names == {
        "decoder.layers_0.self_attention",
        "decoder.layers_1.self_attention",
        "decoder.layers_remainder.layers_0.self_attention",
    }


def test_a_stack_has_one_axis_more():
    assert [presets.equinox("q", stack_axis=axis)[0].layout for axis in (0, 1, 2, -1, -2, -3)] == [
        "l (h k) d",
        "(h k) l d",
        "(h k) d l",
        "(h k) d l",
        "(h k) l d",
        "l (h k) d",
    ]
    for axis in (3, -4):
        with pytest.raises(HoraError, match=f"has 3 axes, got stack_axis={axis}"):
            presets.equinox("q", stack_axis=axis)


def test_projections_are_in_the_order_of_their_modules():
    assert [target.projection for target in presets.attention(("v", "q"))] == ["q", "v"]
    with pytest.raises(HoraError, match=r"got \['o'\]"):
        presets.vit(("q", "o"))


def shapes(**leaves):
    return {name: {"w": jax.ShapeDtypeStruct(shape, "float32")} for name, shape in leaves.items()}


@pytest.mark.parametrize(
    ("attention", "paths"),
    [
        (shapes(q_proj=(16, 4, 4), k_proj=(16, 2, 4), v_proj=(16, 2, 4)), ["q_proj", "k_proj", "v_proj"]),
        (shapes(q_einsum=(4, 16, 4), kv_einsum=(2, 2, 16, 4)), ["q_einsum", "kv_einsum", "kv_einsum"]),
        (shapes(qkv_einsum=(3, 4, 16, 4)), ["qkv_einsum"] * 3),
    ],
)
def test_tunix_projections_have_the_modules_of_transformers_wherever_they_lie(method, attention, paths):
    planned = make_plan({"layers": [{"attn": attention}] * 2}, method, presets.tunix("qkv"))
    assert [layer.name for layer in planned.layers] == [f"model.layers.{i}.self_attn" for i in range(2)]
    for i, layer in enumerate(planned.layers):
        assert [site.path for site in layer.sites] == [f"layers.{i}.attn.{path}.w" for path in paths]
        assert [(site.projection, site.module) for site in layer.sites] == [(p, f"{p}_proj") for p in "qkv"]
        fused = next(iter(attention)).partition("_")[0] if len(attention) == 1 else "kv"
        for site in layer.sites:
            if "einsum" in site.path and len(attention[site.path.split(".")[-2]]["w"].shape) == 4:
                place = fused.index(site.projection)
                assert site.layout.window == Window(0, place, place + 1)
            else:
                assert site.layout.window is None


def test_equinox_attention_in_a_stack_made_by_vmap(method):
    make = eqx.filter_vmap(lambda key: eqx.nn.MultiheadAttention(4, 16, key=key))
    planned = make_plan({"attn": make(jax.random.split(jax.random.key(0), 3))}, method, presets.equinox(stack_axis=0))
    assert [layer.names for layer in planned.layers] == [("attn.0", "attn.1", "attn.2")]


def test_equimo_s_rows_are_a_third_of_the_fused_weight_each_and_its_layers_are_named_as_in_timm(method):
    """Without equimo: the names and shapes of its ViT; test_equimo.py runs its models."""

    class Attention(eqx.Module):
        qkv: eqx.nn.Linear
        num_heads: int = eqx.field(static=True)

    blocks = [{"attn": Attention(eqx.nn.Linear(16, 48, key=jax.random.key(i)), 4)} for i in range(2)]
    planned = make_plan({"blocks": [{"blocks": blocks}]}, method, presets.equimo_vit("qkv"))
    assert [layer.name for layer in planned.layers] == ["blocks.0.attn", "blocks.1.attn"]
    for layer in planned.layers:
        assert [site.layout.window for site in layer.sites] == [Window(0, 16 * i, 16 * (i + 1)) for i in range(3)]
