"""`adapt`: any function of a tree equals itself on merged weights, in value and gradients, without a dense gradient."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hora_jax import Target, adapt, init, make_plan, merge
from hora_jax.follow import RULES
from hora_spec import AdapterSpec, HoraError, Layout, Window
from jax import export
from jax.extend.core import jaxprs_in_params

SPEC = AdapterSpec(5, hidden_dim=6, head_embed_dim=6)
D, H, K = 16, 4, 4
KEY = jax.random.key(0)


def some(i: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(KEY, i), shape, jnp.float32) / 4  # float32 under x64, too


PARAMS = {
    "attn": {"q": some(0, D, H, K), "v": some(1, D, H, K)},
    "first": {"q": some(2, 3, D, H, K), "v": some(3, 3, D, H, K)},
    "inner": {"q": some(4, D, 3, H, K)},
    "qkv": some(5, D, 3 * D),
    "blocks": some(6, D, H * 3 * K),
}
X = some(9, 2, 6, D)


def attention(params):
    return make_plan(params, SPEC, [Target(f"attn.{p}", p, "d h k", layer="a") for p in "qv"])


PER_HEAD = [
    Target("blocks", p, Layout("d (h k)", Window(1, i * K, (i + 1) * K, blocks=H)), H, layer="f")
    for i, p in ((0, "q"), (2, "v"))
]
PLANS = {
    "apart": attention(PARAMS),
    "first": make_plan(PARAMS, SPEC, [Target(f"first.{p}", p, "l d h k", layer="l.{l}") for p in "qv"]),
    "inner": make_plan(PARAMS, SPEC, Target("inner.q", "q", "d l h k", layer="l.{l}")),
    "fused": make_plan(
        PARAMS,
        SPEC,
        [
            Target("qkv", p, Layout("d (h k)", Window(1, i * D, (i + 1) * D)), H, layer="f")
            for i, p in ((0, "q"), (2, "v"))
        ],
    ),
    "per head": make_plan(PARAMS, SPEC, PER_HEAD),
    "own inputs": make_plan(PARAMS, AdapterSpec(5, sharing="none"), PER_HEAD),
    "both": make_plan(
        PARAMS,
        SPEC,
        [
            Target(f"{path}.{p}", p, pattern, layer=layer)
            for path, pattern, layer in (("attn", "d h k", "a"), ("first", "l d h k", "l.{l}"))
            for p in "qv"
        ],
    ),
}


def heads(x, w):
    return jnp.einsum("bsd,dhk->bshk", x, w)


def flat(w):
    return w.reshape(D, H * K)


def einsum(p, x):
    return heads(x, p["attn"]["q"]), x @ flat(p["attn"]["v"])


def on_the_left(p, x):
    return jnp.tensordot(p["attn"]["q"].transpose(1, 2, 0).reshape(H * K, D), x, ((1,), (2,)))


def and_back(p, x):
    return x @ flat(p["attn"]["q"]) @ flat(p["attn"]["q"]).T


def by_itself(p, x):
    return x @ (flat(p["attn"]["q"]) @ flat(p["attn"]["q"]).T)


def cast(p, x):
    return x @ flat(p["attn"]["q"].astype(jnp.bfloat16).astype(jnp.float32))


def stacked(p, x):
    return jnp.einsum("bsd,cdhk->cbshk", x, jnp.stack([p["attn"]["q"], p["attn"]["v"]]))


def side_by_side(p, x):
    return x @ jnp.concatenate([flat(p["attn"]["q"]), p["qkv"][:, :4], flat(p["attn"]["v"])], axis=1)


def by_heads(p, x):
    return jnp.einsum("bhd,dhk->bhk", x[:, :H], p["attn"]["q"])


def mapped(p, x):
    return jax.vmap(jax.vmap(lambda token: flat(p["attn"]["q"]).T @ token))(x)


def over_heads(p, x):
    return jax.lax.scan(lambda carry, w: (carry, carry @ w), x, p["attn"]["q"].transpose(1, 0, 2))[1]


def chosen(p, x):
    return jax.lax.cond(x.sum() > 0, lambda p: heads(x, p["q"]), lambda p: heads(2 * x, p["v"]), p["attn"])


def compiled(p, x):
    return jax.jit(lambda p, x: {"y": jax.nn.relu(jax.jit(einsum)(p, x)[0]), "nothing": None})(p, x)


def looped(p, x):
    def step(state):
        return state[0] + 1, state[1], jnp.sin(state[2] @ flat(state[1]["q"]))

    return jax.lax.while_loop(lambda state: state[0] < 3, step, (0, p["attn"], x))[2]


def normalised(p, x):
    return heads(x, p["attn"]["q"] / jnp.linalg.norm(p["attn"]["q"]))


def returned(p, x):
    return p["attn"]["q"], x


def with_rules_of_its_own(p, x):
    doubled = jax.custom_vjp(lambda w, x: x @ flat(w))
    doubled.defvjp(lambda w, x: (doubled(w, x), (w, x)), lambda saved, g: (jnp.ones_like(saved[0]), g * 2))
    return doubled(p["attn"]["q"], x)


def stopped(p, x):
    return x @ flat(jax.lax.stop_gradient(p["attn"]["q"])) + heads(x, p["attn"]["v"]).reshape(x.shape)


def scanned(p, x):
    def layer(x, w):
        q = heads(x, w["q"])
        return x + q.reshape(x.shape) @ flat(w["v"]).T, (q.sum(), w)

    return jax.lax.scan(layer, x, p["first"])[0]


def indexed(p, x):
    return jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x + x @ flat(p["first"]["q"][i])), x)


def ensemble(p, x):
    return jax.vmap(lambda w: x @ flat(w))(p["first"]["q"])


def alone_and_scanned(p, x):
    return scanned(p, einsum(p, x)[0].reshape(x.shape))


def rematerialised(p, x):
    def layer(x, w):
        return jax.checkpoint(lambda x, w: jnp.sin(x + heads(x, w).reshape(x.shape)))(x, w), None

    return jax.lax.scan(layer, x, jnp.moveaxis(p["inner"]["q"], 1, 0))[0]


def whole(p, x):
    return x @ p["qkv"]


def split(p, x):
    q, k, v = jnp.split(p["qkv"], 3, axis=1)
    return jnp.tanh(x @ q) * (x @ k) + x @ v


def split_by_head(p, x):
    q, k, v = jnp.unstack(p["blocks"].reshape(D, H, 3, K), axis=2)
    return heads(x, q) * heads(x, k) + heads(x, v)


CASES = [
    ("apart", einsum, 2, 0),
    ("apart", on_the_left, 1, 0),
    ("apart", and_back, 2, 0),
    ("apart", cast, 1, 0),
    ("apart", stacked, 1, 0),
    ("apart", side_by_side, 1, 0),
    ("apart", by_heads, 1, 0),
    ("apart", mapped, 1, 0),
    ("apart", over_heads, 1, 0),
    ("apart", chosen, 2, 0),
    ("apart", compiled, 2, 0),
    ("apart", looped, 1, 0),
    ("apart", stopped, 2, 0),
    ("apart", by_itself, 1, 1),
    ("apart", normalised, 0, 2),
    ("apart", returned, 0, 1),
    ("apart", with_rules_of_its_own, 0, 1),
    ("first", scanned, 2, 0),
    ("first", indexed, 1, 0),
    ("first", ensemble, 1, 0),
    ("inner", rematerialised, 1, 0),
    ("fused", whole, 1, 0),
    ("fused", split, 3, 0),
    ("per head", split_by_head, 3, 0),
    ("own inputs", split_by_head, 3, 0),
    ("both", alone_and_scanned, 4, 0),
]
BY_NAME = pytest.mark.parametrize(("which", "fn", "low", "dense"), CASES, ids=lambda v: getattr(v, "__name__", None))


def close(got, expected, tolerance: float = 1e-4) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected)


def outputs_and_gradients(fn, phi, x):
    def loss(phi, x):
        out = fn(phi, x)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), out

    try:
        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(phi, x)
    except ValueError:  # loops of unknown length have no reverse mode
        return jax.jit(fn)(phi, x)


@pytest.mark.parametrize("route", ["branch", "merge"])
@BY_NAME
def test_an_adapted_function_equals_the_function_of_merged_weights(which, fn, low, dense, route, perturbed):
    planned = PLANS[which]
    phi = perturbed(init(planned))
    adapted = adapt(fn, planned, route=route)
    merged = outputs_and_gradients(lambda phi, x: fn(merge(planned, PARAMS, phi), x), phi, X)
    close(outputs_and_gradients(lambda phi, x: adapted(PARAMS, phi, x), phi, X), merged, 2e-2 if fn is cast else 1e-4)


@BY_NAME
def test_every_use_is_counted_and_dense_ones_are_refused_by_name(which, fn, low, dense):
    planned = PLANS[which]
    phi = init(planned)
    report = adapt(fn, planned).report(PARAMS, phi, X)
    assert (len(report.low_rank), len(report.dense)) == (low, dense), str(report)
    assert all(use.place for use in report.uses if use.primitive != "output")
    strict = lambda: adapt(fn, planned, dense="error")(PARAMS, phi, X)  # noqa: E731
    if dense:
        with pytest.raises(HoraError, match=f"({'|'.join(use.primitive for use in report.dense)}) at|output"):
            jax.eval_shape(strict)
    else:
        jax.eval_shape(lambda: jax.tree.leaves(strict()))


def products(program):
    """Every product of a program and of those inside it."""
    for eqn in program.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from products(inner)


@pytest.mark.parametrize("route", ["branch", "merge"])
@BY_NAME
def test_no_gradient_is_as_large_as_an_adapted_weight(which, fn, low, dense, route):
    if fn is looped:
        return
    planned = PLANS[which]

    def loss(phi, x):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(adapt(fn, planned, route=route)(PARAMS, phi, x)))

    found = []
    for eqn in products(jax.make_jaxpr(jax.grad(loss))(init(planned), some(7, 7, 11, D)).jaxpr):
        (contracted, _), _ = eqn.params["dimension_numbers"]
        over = {eqn.invars[0].aval.shape[i] for i in contracted}
        out = eqn.outvars[0].aval.shape
        sums = over <= {7, 11, 77} and not {5, 10, 20, 40} & set(out)  # over tokens, without ranks
        if sums and np.prod(out) >= D * H * K:
            found.append(out)
    assert bool(found) is (fn in (normalised, by_itself)), found


def test_static_arguments_and_leaves_pass_through(perturbed):
    planned = PLANS["apart"]

    def fn(p, x, *, name, causal, scale=1):
        assert causal is True
        return {"y": scale * heads(x, p["attn"]["q"]), "name": name, "shape": x.shape, "on_host": np.arange(3)}

    out = adapt(fn, planned)(PARAMS, perturbed(init(planned)), X, name="a", causal=True, scale=2)
    assert (out["name"], out["shape"], type(out["on_host"])) == ("a", X.shape, np.ndarray)


def test_integers_random_keys_and_callbacks_work_inside(perturbed):
    planned, seen = PLANS["apart"], []

    def fn(p, tokens, key):
        x = some(8, 9, D)[tokens]
        jax.debug.callback(lambda total: seen.append(float(total)), x.sum(), ordered=True)
        return heads(x * jax.random.bernoulli(key, 0.5, x.shape), p["attn"]["q"])

    args = (np.array([[1, 3], [2, 0]]), jax.random.key(3))
    phi = perturbed(init(planned))
    close(adapt(fn, planned)(PARAMS, phi, *args), fn(merge(planned, PARAMS, phi), *args))
    jax.effects_barrier()
    assert len(seen) == 2


def test_forward_mode_works_on_the_plain_route_and_else_says_so(perturbed):
    planned = PLANS["apart"]
    phi = perturbed(init(planned))

    def along(route):
        return jax.jvp(lambda x: adapt(einsum, planned, route=route)(PARAMS, phi, x), (X,), (X,))[1]

    close(along("plain"), einsum(merge(planned, PARAMS, phi), X))
    with pytest.raises(HoraError, match='route="plain"'):
        along("branch")


def test_a_program_of_any_batch_is_exported(perturbed):
    planned = PLANS["apart"]
    phi = perturbed(init(planned))
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("b, 6, 16"), "float32")
    served, branch = (
        export.export(jax.jit(lambda x, route=route: adapt(einsum, planned, route=route)(PARAMS, phi, x)))(shape)
        for route in ("auto", "branch")
    )
    close(served.call(X), einsum(merge(planned, PARAMS, phi), X))
    assert served.mlir_module().count("dot_general") == branch.mlir_module().count("dot_general")


def test_a_compiled_step_may_donate_the_adapter(perturbed):
    planned = PLANS["apart"]
    phi = perturbed(init(planned))
    loss = lambda phi, x: jnp.sum(adapt(einsum, planned)(PARAMS, phi, x)[0] ** 2)  # noqa: E731
    step = jax.jit(
        lambda phi, x: jax.tree.map(lambda v, g: v - 0.01 * g, phi, jax.grad(loss)(phi, x)), donate_argnums=0
    )
    before = float(loss(phi, X))
    assert float(loss(step(step(phi, X), X), X)) < before
    assert step._cache_size() == 1


def test_planned_weights_are_constants(perturbed):
    planned = PLANS["apart"]
    phi = perturbed(init(planned))
    for route in ("branch", "merge", "plain"):
        grads = jax.grad(lambda p: adapt(einsum, planned, route=route)(p, phi, X)[0].sum())(PARAMS)  # noqa: B023
        assert not grads["attn"]["q"].any()


def test_what_is_no_plan_adapts_nothing():
    with pytest.raises(HoraError, match="a plan is what"):
        adapt(einsum, None)


def test_the_merge_route_multiplies_by_the_sum_and_the_branch_beside_the_base(perturbed):
    planned = PLANS["apart"]

    def dots(route, x=X):
        adapted = adapt(lambda p, x: heads(x, p["attn"]["q"]), planned, route=route)
        program = jax.make_jaxpr(lambda x: adapted(PARAMS, init(planned), x))(x)
        return sum({2, 6} <= set(eqn.outvars[0].aval.shape) for eqn in products(program.jaxpr))

    assert (dots("merge"), dots("branch"), dots("plain"), dots("auto")) == (1, 3, 3, 3)


def test_a_primitive_without_a_rule_gets_the_dense_weight(monkeypatch, perturbed):
    planned = PLANS["apart"]
    phi = perturbed(init(planned))
    for name in ("reshape", "transpose"):
        monkeypatch.delitem(RULES, name)
    adapted = adapt(on_the_left, planned)
    close(adapted(PARAMS, phi, X), on_the_left(merge(planned, PARAMS, phi), X))
    assert [use.primitive for use in adapted.report(PARAMS, phi, X).dense] == ["transpose"]


def test_importing_the_package_does_not_import_flax():
    found = "import sys, hora_jax; print([name for name in sys.modules if name.partition('.')[0] == 'flax'])"
    assert (
        subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
