"""The joint start of A under scan and grouped queries, against gradients that are formed whole."""

import itertools
from functools import cache

import hora_jax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hora_jax import Target
from hora_spec import AdapterSpec, HoraError, preset

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
        phi, adapted = hora_jax.init(made), hora_jax.adapt(loss, made)
        step = jax.jit(jax.grad(lambda phi, adapted=adapted: adapted(PARAMS, phi, BATCHES[0])))
        flops[source] = step.lower(phi).compile().cost_analysis()["flops"]
        labels = jax.tree.map(lambda label: "fixed" if label == "fixed" else "trained", hora_jax.labels(made, phi))
        state = optax.multi_transform({"trained": optax.adamw(1e-2), "fixed": optax.set_to_zero()}, labels).init(phi)
        held[source] = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim)
    a = 2 * LAYERS * 3 * EMBED  # numbers of A in q and v
    assert held["direct"] - held["fixed"] == 2 * a * 4
    assert flops["fixed"] < flops["direct"]


def test_i7_an_a_of_its_own_per_head_has_no_joint_start():
    made = plan(AdapterSpec(3, sharing="none"))
    with pytest.raises(HoraError, match=r"which heads share.*\(spec I7\)"):
        hora_jax.joint_a(made, loss, PARAMS, hora_jax.init(made), BATCHES)


def test_g7_a_fixed_a_has_no_gradient():
    made = plan()
    phi = jax.tree.map(lambda value: value + 1, hora_jax.init(made))
    grads = jax.grad(lambda phi: hora_jax.adapt(loss, made)(PARAMS, phi, BATCHES[0]))(phi)["blocks.*"]
    assert not any(np.any(grads[name]) for name in ("a.q", "a.v"))
    assert all(np.any(grads[name]) for name in ("b.q", "b.v"))


def test_s6_an_optimiser_that_decays_leaves_a_fixed_a_by_its_label():
    optax = pytest.importorskip("optax")
    made = plan()
    phi = jax.tree.map(lambda value: value + 1, hora_jax.init(made))
    labels = hora_jax.labels(made, phi)
    assert labels["blocks.*"] == {"a.q": "fixed", "a.v": "fixed", "b.q": "B", "b.v": "B"}
    optimiser = optax.multi_transform({"B": optax.adamw(1e-2, weight_decay=0.5), "fixed": optax.set_to_zero()}, labels)
    grads = jax.tree.map(jnp.ones_like, phi)
    updates, state = optimiser.update(grads, optimiser.init(phi), phi)
    moved = optax.apply_updates(phi, updates)["blocks.*"]
    np.testing.assert_array_equal(moved["a.q"], phi["blocks.*"]["a.q"])
    assert np.all(moved["b.q"] != phi["blocks.*"]["b.q"])
    sizes = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(sizes) == 2 * sum(phi["blocks.*"][f"b.{p}"].size for p in "qv")
