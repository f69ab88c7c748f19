"""The joint start of A under scan and grouped queries, against gradients that are formed whole."""

import inspect
import itertools
from functools import cache

import hora_jax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hora_jax import Target
from hora_spec import AdapterSpec, HoraError, joint_start, preset

LAYERS, EMBED = 3, 16
SHAPES = {"q": (LAYERS, EMBED, 4, 4), "v": (LAYERS, EMBED, 2, 4), "o": (LAYERS, 24, EMBED)}
PARAMS = {name: 0.3 * jax.random.normal(jax.random.key(i), shape) for i, (name, shape) in enumerate(SHAPES.items())}
BATCHES = [jax.random.normal(jax.random.key(i), (20, EMBED)) * jnp.linspace(0.2, 2, EMBED) for i in range(3)]
TARGETS = [Target(name, name, "l d h k", layer="blocks.{l}") for name in "qv"]


def loss(params, x):
    def block(x, w):
        q, v = (jnp.einsum("bd,dhk->bhk", x, w[name]).reshape(len(x), -1) for name in "qv")
        return x + jnp.tanh(jnp.concatenate([q, v], -1)) @ w["o"], None

    return jnp.square(jax.lax.scan(block, x, params)[0] - 1).mean()


def plan(spec=None):
    return hora_jax.make_plan(PARAMS, spec or preset("joint", 3), TARGETS)


@cache
def started(**options):
    made = plan()
    return hora_jax.joint_a(made, loss, PARAMS, hora_jax.init(made), BATCHES, power=2, **options)


@cache
def gradients():
    grads = jax.grad(lambda params: sum(loss(params, x) for x in BATCHES) / len(BATCHES))(PARAMS)
    return {name: np.asarray(grads[name]).reshape(LAYERS, EMBED, -1).swapaxes(1, 2) for name in "qv"}


def projector(rows):
    basis = np.linalg.qr(np.asarray(rows, np.float64).T)[0]
    return basis @ basis.T


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("p", "qv")
def test_i7_a_spans_what_plain_differentiation_finds(layer, p):
    phi, start = started()
    exact = np.linalg.svd(gradients()[p][layer])[2][:3]
    np.testing.assert_allclose(projector(phi["blocks.*"][f"a.{p}"][layer]), projector(exact), atol=1e-3)
    np.testing.assert_array_equal(phi["blocks.*"][f"a.{p}"][layer], start.params[f"blocks.{layer}"][f"a.{p}"])


def test_i7_the_scale_makes_a_read_as_strongly_as_lora_s():
    x, a = np.concatenate(BATCHES), np.asarray(started()[0]["blocks.*"]["a.q"][0])
    assert np.square(x @ a.T).sum(1).mean() == pytest.approx(3 * np.square(x).sum(1).mean() / (3 * EMBED), rel=1e-4)


def test_i7_of_inputs_takes_their_principal_directions():
    a = started(of="inputs")[0]["blocks.*"]["a.v"][0]
    exact = np.linalg.svd(np.concatenate(BATCHES))[2][:3]
    np.testing.assert_allclose(projector(a), projector(exact), atol=2e-2)


def test_i7_the_rest_of_the_adapter_stays():
    before, (after, _) = hora_jax.init(plan()), started()
    for name, value in before["blocks.*"].items():
        if name.startswith("b."):
            np.testing.assert_array_equal(after["blocks.*"][name], value)


def test_i7_an_adapter_that_was_trained_is_refused():
    made = plan()
    phi = jax.tree.map(jnp.ones_like, hora_jax.init(made))
    with pytest.raises(HoraError, match=r"before training.*\(spec I7\)"):
        hora_jax.joint_a(made, loss, PARAMS, phi, BATCHES)


def test_i7_no_batches_no_start():
    made = plan()
    with pytest.raises(HoraError, match=r"got none \(spec I7\)"):
        hora_jax.joint_a(made, loss, PARAMS, hora_jax.init(made), [])


def test_i7_batches_without_end_are_refused():
    made = plan()
    with pytest.raises(HoraError, match=r"more than 256.*\(spec I7\)"):
        hora_jax.joint_a(made, loss, PARAMS, hora_jax.init(made), itertools.cycle(BATCHES))


@pytest.mark.parametrize("factor", [1.0, 1e-5, 1e3])
def test_i7_gradients_in_float16_do_not_vanish(factor):
    """At 1e-5 those of a token are below the smallest number of float16."""
    narrow, batches = jax.tree.map(lambda value: value.astype(jnp.float16), (PARAMS, BATCHES))

    def small(params, x):
        def block(x, w):
            q, v = (jnp.einsum("bd,dhk->bhk", x, w[name]).reshape(len(x), -1) for name in "qv")
            return x + jnp.tanh(jnp.concatenate([q, v], -1)) @ w["o"], None

        return factor * jnp.square(jax.lax.scan(block, x, params)[0].astype(jnp.float32) - 1).mean()

    made = hora_jax.make_plan(narrow, preset("joint", 3), TARGETS)
    phi, _ = hora_jax.joint_a(made, small, narrow, hora_jax.init(made), batches, power=2)
    for p in "qv":
        for own, wide in zip(phi["blocks.*"][f"a.{p}"], started()[0]["blocks.*"][f"a.{p}"], strict=True):
            np.testing.assert_allclose(projector(own), projector(wide), atol=0.05)


def test_s6_a_fixed_a_costs_less_backward_work_than_a_trained_one_and_no_optimiser_state():
    optax, flops, held = pytest.importorskip("optax"), {}, {}
    for source in ("fixed", "direct"):
        made = plan(AdapterSpec(3, sharing="a", a_source=source))
        adapted, (trained, fixed) = hora_jax.adapt(loss, made), hora_jax.split(made, hora_jax.init(made))

        def value(trained, fixed, adapted=adapted):
            return adapted(PARAMS, hora_jax.join(trained, fixed), BATCHES[0])

        flops[source] = jax.jit(jax.grad(value)).lower(trained, fixed).compile().cost_analysis()["flops"]
        state = optax.adamw(1e-2).init(trained)
        held[source] = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim)
    a = 2 * LAYERS * 3 * EMBED  # numbers of A in q and v
    assert held["direct"] - held["fixed"] == 2 * a * 4
    assert flops["fixed"] < flops["direct"]


def test_i7_an_a_of_its_own_per_head_has_no_joint_start():
    made = plan(AdapterSpec(3, sharing="none"))
    with pytest.raises(HoraError, match=r"which heads share.*\(spec I7\)"):
        hora_jax.joint_a(made, loss, PARAMS, hora_jax.init(made), BATCHES)


def through_adapt(phi):
    return hora_jax.adapt(loss, plan())(PARAMS, phi, BATCHES[0])


def through_merge(phi):
    return loss(hora_jax.merge(plan(), PARAMS, phi), BATCHES[0])


def through_deltas(phi):
    return sum(jnp.sum(value) for value in jax.tree.leaves(hora_jax.delta(plan(), phi)))


@pytest.mark.parametrize("fn", [through_adapt, through_merge, through_deltas])
@pytest.mark.parametrize("transform", [jax.grad, lambda fn: jax.jit(jax.grad(jax.checkpoint(fn))), jax.jacfwd])
def test_g7_a_fixed_a_is_not_differentiated_so_that_no_decay_can_move_it(fn, transform):
    with pytest.raises(HoraError, match=r"derivative with respect to 'a\.[qv]'.*hora_jax\.split"):
        transform(fn)(hora_jax.init(plan()))


def test_s6_an_optimiser_that_decays_never_sees_a_fixed_a():
    optax = pytest.importorskip("optax")
    made = plan()
    phi = jax.tree.map(lambda value: value + 1, hora_jax.init(made))
    trained, fixed = hora_jax.split(made, phi)
    grads = jax.grad(lambda trained: through_adapt(hora_jax.join(trained, fixed)))(trained)
    assert grads["blocks.*"].keys() == {"b.q", "b.v"}
    assert all(np.any(value) for value in jax.tree.leaves(grads))
    optimiser = optax.adamw(1e-2, weight_decay=0.5)
    updates, state = optimiser.update(grads, optimiser.init(trained), trained)
    moved = hora_jax.join(optax.apply_updates(trained, updates), fixed)
    assert moved.keys() == phi.keys()
    for name, value in moved["blocks.*"].items():
        assert np.array_equal(value, phi["blocks.*"][name]) == name.startswith("a."), name
    held = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(held) == 2 * made.params_count


def test_labels_tell_what_is_fixed_of_the_whole_and_of_its_parts():
    made = plan()
    phi = hora_jax.init(made)
    trained, fixed = hora_jax.split(made, phi)
    assert hora_jax.labels(made, phi)["blocks.*"] == {"a.q": "fixed", "a.v": "fixed", "b.q": "B", "b.v": "B"}
    assert hora_jax.labels(made, trained)["blocks.*"] == {"b.q": "B", "b.v": "B"}
    assert hora_jax.labels(made, fixed)["blocks.*"] == {"a.q": "fixed", "a.v": "fixed"}
    with pytest.raises(HoraError, match=r"got also \['c'\]"):
        hora_jax.labels(made, {"blocks.*": {"c": 1}})
    with pytest.raises(HoraError, match="groups of one plan"):
        hora_jax.join(trained, {})


def test_a_fixed_a_is_verified_without_its_gradient():
    made = plan()
    found = hora_jax.verify(made, loss, PARAMS, hora_jax.init(made), BATCHES[0])
    assert found.ok, str(found)


def test_i7_the_directions_come_with_the_singular_values_of_the_mean_gradient():
    _, start = started()
    for i in range(LAYERS):
        for p in "qv":
            exact = np.linalg.svd(gradients()[p][i])[1]
            found = start.spectra[f"blocks.{i}"][f"a.{p}"]
            np.testing.assert_allclose(found[:3], exact[:3], rtol=1e-3)


def test_i7_of_inputs_comes_with_those_of_all_tokens():
    found = started(of="inputs")[1].spectra["blocks.0"]["a.q"]
    exact = np.linalg.svd(np.concatenate(BATCHES))[1][:3]
    np.testing.assert_allclose(found[:3] / found[0], exact / exact[0], rtol=2e-2)


def test_i7_every_option_reaches_the_search_and_their_defaults_are_its_own(monkeypatch):
    """A group of one layer, too."""
    given = {"of": "inputs", "scale": "rows", "together": True, "power": 3, "oversample": 5, "seed": 7}
    ours, theirs = (inspect.signature(fn).parameters for fn in (hora_jax.joint_a, joint_start))
    assert {name: ours[name].default for name in given} == {name: theirs[name].default for name in given}
    seen = {}

    def search(layers, measure, **options):
        seen.update(options)
        return joint_start(layers, measure, **options)

    monkeypatch.setattr("hora_jax.joint.joint_start", search)
    params = {**PARAMS, "o": PARAMS["o"][:1]}
    made = hora_jax.make_plan(params, preset("joint", 3), [Target("o", "q", "l d (h k)", 4, layer="one.{l}")])
    x = jax.random.normal(jax.random.key(9), (20, 24))
    phi = hora_jax.init(made)
    hora_jax.joint_a(made, lambda p, x: jnp.square(x @ p["o"][0] - 1).mean(), params, phi, [x], **given)
    assert seen == given


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"phi": {"blocks.*": {"a.q": jnp.ones(3)}}}, "spec S6"),
        ({"params": {**PARAMS, "q": PARAMS["q"][:2]}}, "plan this tree"),
        ({"loss": 3}, "a function of the parameters"),
    ],
)
def test_i7_what_is_no_loss_tree_or_adapter_of_the_plan_is_refused(change, reason):
    made = plan()
    given = {"loss": loss, "params": PARAMS, "phi": hora_jax.init(made)} | change
    with pytest.raises(HoraError, match=reason):
        hora_jax.joint_a(made, batches=BATCHES, **given)


def test_i7_a_loss_without_finite_gradients_is_refused_at_every_scale():
    made = plan()
    with pytest.raises(HoraError, match=r"finite.*spec I7|spec I7.*finite"):
        hora_jax.joint_a(made, lambda p, x: loss(p, x) * jnp.inf, PARAMS, hora_jax.init(made), BATCHES[:1])
