"""Many adapters of one plan: one for each row of a batch, and what an optimiser is told about them."""

import jax
import jax.numpy as jnp
import optax
import pytest
from hora_jax import adapt_each, init, labels, merge
from hora_spec import HoraError

from .test_adapt import PARAMS, PLANS, D, H, K, X, close, einsum, normalised, products, some


def test_every_row_of_a_batch_has_an_adapter_of_its_own(perturbed):
    planned = PLANS["apart"]
    phis = [perturbed(init(planned, seed), seed) for seed in range(2)]
    each = adapt_each(einsum, planned)
    stacked = jax.tree.map(lambda *values: jnp.stack(values), *phis)
    rows = some(7, 2, 1, D + 1, D)  # so many tokens that each row alone would merge
    got = jax.jit(each)(PARAMS, stacked, rows)
    for i, phi in enumerate(phis):
        close([leaf[i] for leaf in got], list(einsum(merge(planned, PARAMS, phi), rows[i])))
    made = [eqn.outvars[0].aval.shape for eqn in products(jax.make_jaxpr(each)(PARAMS, stacked, rows).jaxpr)]
    assert not [shape for shape in made if sorted(shape) == sorted((2, D, H, K))]


def test_labels_tell_the_generators_apart():
    planned = PLANS["apart"]
    phi = init(planned)
    found = labels(planned, phi)["a"]
    assert {name for name, label in found.items() if label == "A"} == {"a.q", "a.v"}
    rates = {"A": optax.sgd(1.0), "B": optax.sgd(16.0)}
    tx = optax.multi_transform(rates, labels(planned, phi))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, phi), tx.init(phi))
    assert (float(updates["a"]["a.q"].max()), float(updates["a"]["b_in"].max())) == (-1, -16)


def test_a_dense_use_is_refused_for_rows_too():
    stacked = jax.tree.map(lambda v: v[None], init(PLANS["apart"]))
    with pytest.raises(HoraError, match="dense='error'"):
        adapt_each(normalised, PLANS["apart"], dense="error")(PARAMS, stacked, X[:1, None])


@pytest.mark.parametrize("alone", [float, jnp.asarray], ids=["numbers", "arrays"])
def test_adapters_of_rows_have_a_leading_axis(alone):
    phis = jax.tree.map(lambda v: alone(0), init(PLANS["apart"]))
    with pytest.raises(HoraError, match=r"stacked on a leading axis, got \['.*'\] without one"):
        adapt_each(einsum, PLANS["apart"])(PARAMS, phis, X)
