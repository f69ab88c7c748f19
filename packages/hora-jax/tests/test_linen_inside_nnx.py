"""Linen modules inside NNX models, `flax.nnx.bridge.ToNNX`: planned, adapted, trained and merged like any other."""

import hora_jax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hora_jax import Target, init, make_plan
from hora_jax.nnx import HoraModel, HoraParam
from hora_spec import AdapterSpec, HoraError

SPEC = AdapterSpec(3, hidden_dim=5, head_embed_dim=4)
TARGETS = [Target(f"attn.{name}.kernel", name[0], "d h k", layer="attn") for name in ("query", "value")]
X = jax.random.normal(jax.random.key(0), (2, 5, 16))


class Attention(linen.Module):
    @linen.compact
    def __call__(self, x, *, train=False):
        x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.Dropout(0.1, deterministic=not train)(x)
        q, v = (linen.DenseGeneral((4, 4), name=name)(x) for name in ("query", "value"))
        return (jnp.tanh(q) * v).reshape(x.shape)


class Model(nnx.Module):
    def __init__(self, *, lazy=True):
        inside = nnx.bridge.ToNNX(Attention(), rngs=nnx.Rngs(0, dropout=1))
        self.attn = nnx.bridge.lazy_init(inside, X) if lazy else inside
        self.out = nnx.Linear(16, 16, rngs=nnx.Rngs(2))

    def __call__(self, x, **how):
        return self.out(self.attn(x, **how))


@pytest.fixture
def model(perturbed):
    base = Model()
    plan = make_plan(base, SPEC, TARGETS)
    return HoraModel(base, plan, perturbed(init(plan)), dense="error")


def test_adapted_is_merged_and_verified(model):
    np.testing.assert_allclose(model(X), model.merged()(X), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, X), model(X), rtol=1e-4, atol=1e-5)
    assert not np.allclose(model(X), model.base(X), atol=1e-2)
    found = hora_jax.verify(model.plan, lambda m, x: m(x), model.base, model.adapter(), X)
    assert found.ok, str(found)
    assert len(found.uses.low_rank) == 2


def test_it_trains_with_statistics_and_random_streams_of_the_linen_module(model):
    how = {"train": True, "mutable": ["batch_stats"]}
    before = jnp.copy(model.base.attn.BatchNorm_0["mean"][...])
    loss = lambda m: jnp.square(m(X + 1, **how)).mean()  # noqa: E731
    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, HoraParam))(model)
    assert np.isfinite(value)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert not np.array_equal(model.base.attn.BatchNorm_0["mean"][...], before)
    assert not np.array_equal(model(X, **how), model(X, **how))  # masks of its own dropout


def test_a_module_that_was_not_initialised_has_no_leaves_to_plan(model):
    with pytest.raises(HoraError, match=r"got none for \['attn.query.kernel'"):
        make_plan(Model(lazy=False), SPEC, TARGETS)
    with pytest.raises(HoraError, match="no such leaf"):
        HoraModel(Model(lazy=False), model.plan, model.adapter())
