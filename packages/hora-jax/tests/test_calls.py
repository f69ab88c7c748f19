"""Programs inside programs: each runs again as it was written, with planned weights inside, around it and behind it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hora_jax import Target, adapt, init, make_plan, merge
from hora_spec import AdapterSpec, HoraError
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

D = 4
PARAMS = {name: 0.5 * jax.random.normal(jax.random.key(i), (3, D, D)) for i, name in enumerate("qv")}
PLAN = make_plan(
    PARAMS,
    AdapterSpec(2, hidden_dim=3, head_embed_dim=3),
    [Target(p, p, "l d (h k)", 2, layer="a.{l}") for p in "qv"],
)
X = jax.random.normal(jax.random.key(9), (2, D))


def carried(p, x):
    """Weights among what a scan carries, behind its constants, and among what it returns."""

    def step(carry, row):
        x, y, w = carry
        return (x @ w[0] + 2 * X, y + 1, w), (row["v"], x @ row["q"])

    (x, y, w), (rows, out) = lax.scan(step, (x, 0.0, p["q"]), p)
    return x @ w[1] + y, out, x @ rows[2]


def in_while(p, x):
    """Weights among what a loop carries, and beside what its condition and its body close over."""
    most, add = jnp.float32(1e3), 0.1 * x

    def step(state):
        i, x, w, other = state
        return i + 1, jnp.sin(x @ w[i] + x @ p["q"][0]) + add, w, other

    i, x, w, other = lax.while_loop(lambda s: (s[0] < 3) & (s[1].sum() < most), step, (0, x, p["v"], p["q"]))
    return i, x @ w[0] @ other[1]


def through_a_choice(p, x):
    """Both branches hand one weight on, and compute with it."""
    w, y = lax.cond(x.sum() < 0, lambda p, x: (p["q"], x), lambda p, x: (p["q"], x @ p["v"][0]), p, x)
    return y @ w[0]


def over_an_axis_of_one_factor(p, x):
    return lax.scan(lambda carry, w: (carry, x @ w), 0.0, p["q"][0].T)[1]


def compiled(p, x):
    w, y = jax.jit(lambda w, x: (w, x @ w[0]))(p["q"], x)
    return y @ w[1]


@pytest.mark.parametrize("fn", [carried, in_while, through_a_choice, over_an_axis_of_one_factor, compiled])
def test_weights_that_a_program_hands_on_are_followed(fn, perturbed):
    phi = perturbed(init(PLAN))
    got, expected = adapt(fn, PLAN, dense="error")(PARAMS, phi, X), fn(merge(PLAN, PARAMS, phi), X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_a_choice_between_two_weights_is_dense(perturbed):
    def fn(p, x):
        return x @ lax.cond(x.sum() < 0, lambda p: p["q"][0], lambda p: p["v"][0], p)

    phi = perturbed(init(PLAN))
    adapted = adapt(fn, PLAN)
    np.testing.assert_allclose(adapted(PARAMS, phi, X), fn(merge(PLAN, PARAMS, phi), X), rtol=1e-4, atol=1e-5)
    assert [use.primitive for use in adapted.report(PARAMS, phi, X).dense] == ["cond", "cond"]


def programs(jaxpr, *names):
    """What a program's calls of one primitive, whose name depends on JAX, say."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in names:
            yield eqn.params
        for inner in jaxprs_in_params(eqn.params):
            yield from programs(inner, *names)


def said(fn, keys, *names):
    """How calls are made in a function, and in the adapted function."""
    made = [jax.make_jaxpr(fn)(PARAMS, X), jax.make_jaxpr(adapt(fn, PLAN))(PARAMS, init(PLAN), X)]
    return [[{key: params[key] for key in keys} for params in programs(program.jaxpr, *names)] for program in made]


@pytest.mark.parametrize("cse", [False, True])
def test_rematerialisation_keeps_its_policy(cse):
    policy = jax.checkpoint_policies.dots_saveable
    fn = jax.checkpoint(lambda p, x: jnp.sin(x @ p["q"][0]), prevent_cse=cse, policy=policy)
    before, after = said(fn, ["prevent_cse", "policy"], "checkpoint", "remat2", "remat")
    assert before == after == [{"prevent_cse": cse, "policy": policy}]


def test_scans_keep_their_direction_and_unrolling():
    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, p["q"], reverse=True, unroll=3)

    before, after = said(fn, ["reverse", "unroll", "length"], "scan")
    assert before == after
    assert len(before) == 1


def mesh_of(kind):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))


@pytest.mark.parametrize("names", [{"data"}, {"data", "model"}])
@pytest.mark.parametrize("check", [False, True])
def test_shard_map_keeps_its_axes_and_its_checks(names, check):
    mesh = mesh_of(AxisType.Auto)
    key = "manual_axes" if "manual_axes" in jax_shard_map_params(mesh) else "newly_manual_axes"

    def fn(p, x):
        local = lambda p, x: x @ p["q"][0]  # noqa: E731
        return jax.shard_map(
            local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), axis_names=names, check_vma=check
        )(p, x)

    before, after = said(fn, [key, "check_vma", "out_specs"], "shard_map")
    assert before == after
    assert [one[key] for one in before] == [frozenset(names)]


def jax_shard_map_params(mesh):
    program = jax.make_jaxpr(jax.shard_map(lambda x: x, mesh=mesh, in_specs=P(), out_specs=P()))(X)
    return next(programs(program.jaxpr, "shard_map"))


def test_results_of_a_compiled_function_keep_their_sharding():
    where = NamedSharding(mesh_of(AxisType.Auto), P("data"))

    def fn(p, x):
        w, y = jax.jit(lambda w, x: (w, x @ w[0]), out_shardings=(None, where))(p["q"], x)
        return y @ w[1]

    after = jax.make_jaxpr(adapt(fn, PLAN, dense="error"))(PARAMS, init(PLAN), X)
    assert [params["sharding"] for params in programs(after.jaxpr, "sharding_constraint")] == [where]


@pytest.mark.parametrize(("axis", "check"), [(0, True), (1, False), (2, True)])
def test_a_weight_gathered_from_shards_has_the_delta_of_all_of_them(axis, check, perturbed):
    """Along its last axes each of four devices holds one entry, which hides whose axis it is."""
    params = {"q": jax.random.normal(jax.random.key(0), (8, 4, 4))}
    planned = make_plan(params, AdapterSpec(2, sharing="a"), Target("q", "q", "d h k", layer="a"))
    phi = perturbed(init(planned))

    def local(w):
        tiled = lax.all_gather(w, "all", axis=axis, tiled=True)
        apart = lax.all_gather(w, "all", axis=axis).reshape(tiled.shape)
        return [lax.pmean(jnp.einsum("bd,dhk->bhk", jnp.ones((2, 8)), w), "all") for w in (tiled, apart)]

    mesh = jax.make_mesh((4,), ("all",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=P(*(None,) * axis, "all"), out_specs=P(), check_vma=check)
    adapted = adapt(lambda p: mapped(p["q"]), planned)
    for got in jax.jit(adapted)(params, phi):
        np.testing.assert_allclose(got[0], merge(planned, params, phi)["q"].sum(0), rtol=1e-4, atol=1e-4)
    report = adapted.report(params, phi)
    assert (len(report.low_rank), len(report.dense)) == (1, 1)


@pytest.mark.parametrize("swap", [False, True])
def test_of_two_weights_that_are_multiplied_the_smaller_is_dense(swap, perturbed):
    def fn(p, _):
        q, v = p["q"][0], p["v"][0][:, :2]
        return v.T @ q.T if swap else q @ v

    phi, adapted = perturbed(init(PLAN)), adapt(fn, PLAN)
    np.testing.assert_allclose(adapted(PARAMS, phi, X), fn(merge(PLAN, PARAMS, phi), X), rtol=1e-4, atol=1e-5)
    report = adapted.report(PARAMS, phi, X)
    assert [[use.path for use in uses] for uses in (report.dense, report.low_rank)] == [["v"], ["q"]]


@pytest.mark.parametrize("dense", ["maybe", ["allow"]])
def test_dense_uses_are_allowed_or_refused(dense):
    with pytest.raises(HoraError, match="dense must be one of allow, error"):
        adapt(carried, PLAN, dense=dense)
