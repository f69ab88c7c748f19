"""Dropout: which entries of which inputs are dropped, seen on a delta that hands its input through."""

import hora_jax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hora_jax import Target, adapt
from hora_jax.nnx import HoraModel, HoraParam
from hora_spec import AdapterSpec, HoraError, Layout, Window
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

D, H, K, RATE, LAYERS = 16, 4, 4, 0.25, 3
SPEC = AdapterSpec(D, sharing="a", alpha=float(D))
KEY = jax.random.key(7)
X = 1 + jax.random.uniform(jax.random.key(1), (2, 50, D))
PARAMS = {
    "q": jnp.zeros((D, H, K)),
    "v": jnp.zeros((D, H, K)),
    "qv": jnp.zeros((D, 2 * D)),
    "stack": jnp.zeros((LAYERS, D, D)),
}


def plan_of(*names):
    windows = {p: Layout("d (h k)", Window(1, i * D, (i + 1) * D)) for i, p in enumerate("qv")}
    targets = {
        "apart": [Target(p, p, "d h k", layer="a") for p in "qv"],
        "fused": [Target("qv", p, windows[p], H, layer="f") for p in "qv"],
        "stack": [Target("stack", "q", "l d (h k)", H, layer="s.{l}")],
    }
    return hora_jax.make_plan(PARAMS, SPEC, [t for name in names for t in targets[name]])


def identity(plan):
    """An adapter whose deltas are the identity: a product with a weight of zeros returns what its branch reads."""

    def value(name, v):
        return jnp.broadcast_to(jnp.eye(D).reshape(v.shape[1:]), v.shape)

    return {key: {name: value(name, v) for name, v in own.items()} for key, own in hora_jax.init(plan).items()}


def heads(x, w):
    return jnp.einsum("bsd,dhk->bshk", x, w).reshape(x.shape)


def apart(p, x):
    return heads(x, p["q"]), heads(x, p["v"])


def fused(p, x):
    return tuple(jnp.split(x @ p["qv"], 2, -1))


def twice(p, x):
    return heads(x, p["q"]), heads(x, p["q"])


def in_a_call_called_twice(p, x):
    inner = jax.jit(heads)
    return inner(x, p["q"]), inner(x, p["q"])


def scanned(p, x):
    return tuple(jax.lax.scan(lambda carry, w: (carry, x @ w), 0, p["stack"])[1])


def scanned_in_a_scan(p, x):
    outer = jax.lax.scan(lambda carry, _: (carry, jnp.stack(scanned(p, x))), 0, None, length=2)[1]
    return tuple(outer.reshape(-1, *x.shape))


def chosen(p, x):
    return tuple(jax.lax.cond(x.sum() > v, lambda: heads(x, p["q"]), lambda: heads(x, p["v"])) for v in (0.0, 1e9))


def looped(p, x):
    def step(i, seen):
        return seen.at[i].set(heads(x, p["q"]))

    return tuple(jax.lax.fori_loop(0, LAYERS, step, jnp.zeros((LAYERS, *x.shape))))


def in_while(p, x):
    def step(state):
        i, seen = state
        return i + 1, seen.at[i].set(heads(x, p["q"]))

    return tuple(jax.lax.while_loop(lambda s: s[0] < LAYERS, step, (0, jnp.zeros((LAYERS, *x.shape))))[1])


def rematerialised(p, x):
    return jax.checkpoint(apart)(p, x)


CASES = [
    (apart, "apart", "apart"),
    (twice, "apart", "apart"),
    (in_a_call_called_twice, "apart", "apart"),
    (rematerialised, "apart", "apart"),
    (looped, "apart", "apart"),
    (in_while, "apart", "apart"),
    (scanned, "stack", "apart"),
    (scanned_in_a_scan, "stack", "apart"),
    (chosen, "apart", "apart"),
    (fused, "fused", "shared"),
]


def masks(outputs, x=X):
    """Which inputs were kept; all others are exactly zero, kept ones divided by their share."""
    found = []
    for out in outputs:
        kept = np.asarray(out) != 0
        np.testing.assert_allclose(out, np.where(kept, x / (1 - RATE), 0), rtol=1e-5)
        assert abs(kept.mean() - (1 - RATE)) < 3 / np.sqrt(kept.size)
        found.append(kept)
    return found


def assert_masks(found, kind):
    for i, one in enumerate(found):
        for other in found[:i]:
            assert np.array_equal(one, other) == (kind == "shared")
            if kind == "apart":  # as often equal as two independent masks are
                assert abs((one == other).mean() - (RATE**2 + (1 - RATE) ** 2)) < 0.05


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(("fn", "which", "kind"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_each_product_drops_inputs_of_its_own_and_all_projections_of_one_weight_share_them(fn, which, kind, jit):
    plan = plan_of(which)
    adapted = adapt(fn, plan, dropout=RATE)
    run = (jax.jit if jit else lambda f: f)(lambda key: adapted(PARAMS, identity(plan), X, dropout_key=key))
    found = masks(run(KEY))
    assert_masks(found, kind)
    for again, other in zip(masks(run(KEY)), masks(run(jax.random.key(8))), strict=True):
        assert any(np.array_equal(again, one) for one in found)
        assert not any(np.array_equal(other, one) for one in found)


@pytest.mark.parametrize(("fn", "which", "kind"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_evaluation_drops_nothing(fn, which, kind):
    plan = plan_of(which)
    out = adapt(fn, plan, dropout=RATE)(PARAMS, identity(plan), X, dropout_key=None)
    for value in out:
        np.testing.assert_allclose(value, X, rtol=1e-5)


def test_gradients_are_those_of_the_dropped_input():
    plan = plan_of("apart")
    adapted = adapt(lambda p, x: apart(p, x)[0], plan, dropout=RATE)
    phi = identity(plan)
    (kept,) = masks([adapted(PARAMS, phi, X, dropout_key=KEY)])
    loss = lambda phi, x: adapted(PARAMS, phi, x, dropout_key=KEY).sum()  # noqa: E731
    by_phi, by_x = jax.jit(jax.grad(loss, (0, 1)))(phi, X)
    np.testing.assert_allclose(by_x, kept / (1 - RATE), rtol=1e-5)
    read = np.where(kept, X / (1 - RATE), 0).sum((0, 1))
    np.testing.assert_allclose(by_phi["a"]["a.q"][0], np.broadcast_to(read, (D, D)), rtol=1e-4)
    assert not by_phi["a"]["a.v"].any()


def test_sixteen_bit_inputs_stay_so_and_old_keys_work():
    plan = plan_of("apart")
    params = jax.tree.map(lambda v: v.astype("bfloat16"), PARAMS)
    out = adapt(apart, plan, dropout=RATE)(
        params, identity(plan), X.astype("bfloat16"), dropout_key=jax.random.PRNGKey(0)
    )
    assert out[0].dtype == jnp.bfloat16
    assert abs((out[0] != 0).mean() - (1 - RATE)) < 0.05


def test_the_base_is_not_dropped():
    plan = plan_of("apart")
    params = {**PARAMS, "q": jax.random.normal(KEY, (D, H, K))}
    out = adapt(apart, plan, dropout=RATE)(params, identity(plan), X, dropout_key=KEY)
    masks([out[0] - heads(X, params["q"])])


@pytest.mark.parametrize("jit", [False, True])
def test_shards_drop_alike_exactly_where_they_hold_the_same_input(jit):
    """Tokens over one axis; over the other, columns of the weight, whose shards read the same tokens."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    plan = plan_of("stack")
    x = jnp.broadcast_to(X[:1], (2, *X.shape[1:]))
    specs = ({**dict.fromkeys(PARAMS, P()), "stack": P(None, None, "model")}, P("data"))
    fn = jax.shard_map(lambda p, x: x @ p["stack"][0], mesh=mesh, in_specs=specs, out_specs=P("data", None, "model"))
    phi = {key: {**own, "b.q": jnp.zeros_like(own["b.q"]).at[..., 0].set(1)} for key, own in identity(plan).items()}
    run = (jax.jit if jit else lambda f: f)(lambda key: adapt(fn, plan, dropout=RATE)(PARAMS, phi, x, dropout_key=key))
    out = np.asarray(run(KEY))  # every column is the first entry of what the branch reads
    np.testing.assert_array_equal(out, out[..., :1].repeat(D, -1))
    (kept,) = masks([out[..., :1]], x[..., :1])
    assert not np.array_equal(kept[0], kept[1])


def test_a_shard_map_that_does_not_say_what_varies_is_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    plan = plan_of("stack")
    fn = jax.shard_map(lambda p, x: x @ p["stack"][0], mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    with pytest.raises(HoraError, match="check_vma"):
        adapt(fn, plan, dropout=RATE)(PARAMS, identity(plan), X, dropout_key=KEY)


def test_explicit_meshes_drop_too():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    plan = plan_of("apart")
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        adapted = adapt(apart, plan, dropout=RATE)
        out = jax.jit(lambda x: adapted(PARAMS, identity(plan), x, dropout_key=KEY))(x)
    assert_masks(masks([np.asarray(v) for v in out]), "apart")


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.q, self.v = (nnx.LinearGeneral(D, (H, K), use_bias=False, rngs=rngs) for _ in "qv")

    def __call__(self, x):
        return self.q(x).reshape(x.shape), self.v(x).reshape(x.shape)


@pytest.fixture
def model():
    base = Attention(nnx.Rngs(0))
    nnx.update(base, jax.tree.map(jnp.zeros_like, nnx.state(base)))
    plan = hora_jax.make_plan(base, SPEC, [Target(f"{p}.kernel", p, "d h k", layer="a") for p in "qv"])
    return HoraModel(base, plan, identity(plan), dropout=RATE)


def test_a_model_drops_with_a_key_and_after_eval_without_one(model):
    assert_masks(masks(model(X, dropout_key=KEY)), "apart")
    assert_masks(masks(nnx.jit(lambda m, x, key: m(x, dropout_key=key))(model, X, KEY)), "apart")
    with pytest.raises(HoraError, match="dropout_key=None to evaluate"):
        model(X)
    grads = nnx.grad(lambda m: m(X, dropout_key=KEY)[0].sum(), argnums=nnx.DiffState(0, HoraParam))(model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    model.eval()
    for out in (model(X), model(X, dropout_key=KEY), model.merged()(X)):
        np.testing.assert_allclose(out[0], X, rtol=1e-5)
    model.train()
    with pytest.raises(HoraError, match="got no dropout_key"):
        model(X)
    assert len(model.report(X, dropout_key=KEY).low_rank) == 2


def test_a_report_takes_the_key_that_a_call_takes():
    plan = plan_of("apart")
    assert len(adapt(apart, plan, dropout=RATE).report(PARAMS, identity(plan), X, dropout_key=KEY).low_rank) == 2


def call(**kwargs):
    def run(plan):
        adapted = adapt(
            kwargs.pop("fn", apart), plan, **{k: kwargs.pop(k) for k in ("dropout", "route") if k in kwargs}
        )
        return adapted(PARAMS, identity(plan), X, **kwargs)

    return run


WRONG = {
    "dropout must be a number in": [call(dropout=1.0), call(dropout=-0.1), call(dropout="0.1"), call(dropout=True)],
    'route="merge", which has none': [call(dropout=RATE, route="merge", dropout_key=KEY)],
    "got no dropout_key": [call(dropout=RATE)],
    "pass dropout=rate": [call(dropout_key=KEY)],
    "is one key": [call(dropout=RATE, dropout_key=k) for k in (3, jax.random.split(KEY), jnp.zeros(2))],
    "dropout acts on the input of a product": [
        call(dropout=RATE, dropout_key=KEY, fn=fn)
        for fn in (lambda p, x: p["q"], lambda p, x: heads(x, p["q"] / jnp.linalg.norm(p["q"])))
    ],
}


@pytest.mark.parametrize(("message", "run"), [(m, run) for m, runs in WRONG.items() for run in runs])
def test_dropout_that_cannot_act_is_refused(message, run):
    with pytest.raises(HoraError, match=message):
        run(plan_of("apart"))
