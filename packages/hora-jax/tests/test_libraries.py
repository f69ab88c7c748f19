"""One recipe for each library that users bring: the plan, and `verify` on a model of that library."""

import equinox as eqx
import flax.linen as nn
import jax
import pytest
from hora_jax import Target, init, make_plan, presets, verify

X = jax.random.normal(jax.random.key(0), (2, 5, 16))
QV = (("query", "q"), ("value", "v"))


def equinox():
    model = {"attn": eqx.nn.MultiheadAttention(4, 16, key=jax.random.key(0))}
    return lambda model, x: jax.vmap(lambda row: model["attn"](row, row, row))(x), model, presets.equinox()


def linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(num_heads=4)(x, x)

    return Net().apply, Net().init(jax.random.key(0), X), presets.attention()


def haiku():
    hk = pytest.importorskip("haiku", reason="dm-haiku is not installed", exc_type=ImportError)

    def attention(x):
        return hk.MultiHeadAttention(4, 4, w_init=hk.initializers.VarianceScaling(), name="attn")(x, x, x)

    net = hk.without_apply_rng(hk.transform(attention))
    targets = [Target(f"attn/{name}.w", p, "d (h k)", heads=4, layer="attn") for name, p in QV]
    return net.apply, net.init(jax.random.key(0), X), targets


def keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="keras is not installed", exc_type=ImportError)
    layer = keras.layers.MultiHeadAttention(4, 4)
    layer(X, X)
    weights = {".".join(v.path.split("/")[1:]): v.value for v in layer.trainable_variables}
    rest = [v.value for v in layer.non_trainable_variables]
    targets = [Target(f"{name}.kernel", p, "d h k", layer="attn") for name, p in QV]
    return lambda weights, x: layer.stateless_call([*weights.values()], rest, x, x)[0], weights, targets


@pytest.mark.parametrize("library", [equinox, linen, haiku])
def test_attention_of_a_library_is_adapted_without_dense_uses(library, method):
    check(*library(), method)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_attention_of_keras_is_adapted_without_dense_uses(method, monkeypatch):
    fn, weights, targets = keras(monkeypatch)
    order = list(weights)
    check(lambda weights, x: fn({name: weights[name] for name in order}, x), weights, targets, method)


def check(fn, params, targets, method) -> None:
    planned = make_plan(params, method, targets)
    found = verify(planned, fn, params, init(planned), X)
    assert found.ok, str(found)
    assert (len(found.uses.low_rank), len(found.uses.dense)) == (2, 0)
