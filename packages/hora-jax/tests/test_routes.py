"""What `product` is made of, seen alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hora_jax import routes
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

C = routes.Contraction("td", "od", "rd", "or", "to")


def some(i: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(i).normal(size=shape), "float32")


def test_an_observing_product_returns_what_it_sees_in_place_of_gradients():
    x, a, b = some(0, 5, 3), some(1, 2, 3), some(2, 4, 2)
    y, pullback = jax.vjp(partial(routes.observe, C, x.dtype), x, a, b)
    np.testing.assert_allclose(y, x @ a.T @ b.T, rtol=1e-5)
    for cotangent in (jnp.ones_like(y), 7 * y):
        by_x, by_a, by_b = pullback(cotangent)
        assert not by_x.any()
        np.testing.assert_allclose(by_a, a @ x.T @ x, rtol=1e-5)
        np.testing.assert_allclose(by_b, jnp.full_like(b, jnp.square(x).sum()), rtol=1e-5)


def test_a_branch_is_summed_over_ranks_in_the_dtype_of_its_result():
    """257 is no number of bfloat16."""
    x, a, b = (jnp.asarray(v, "bfloat16") for v in ([[256, 1]], [[1, 0], [0, 1]], [[1, 1]]))
    assert routes.branch(C, jnp.dtype("float32"), x, a, b).item() == 257


def test_an_observing_product_sums_over_inputs_that_devices_share():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    x, a, b = some(0, 6, 3), some(1, 2, 3), some(2, 4, 2)
    with jax.set_mesh(mesh):
        sharded = jax.device_put((x, a, b), tuple(NamedSharding(mesh, spec) for spec in (P("data"), P(), P())))
        y, pullback = jax.vjp(partial(routes.observe, C, x.dtype), *sharded)
        by_a = pullback(y)[1]
    np.testing.assert_allclose(by_a, a @ x.T @ x, rtol=1e-5)


@pytest.mark.parametrize("route", ["branch", "merge", "plain"])
def test_products_and_their_gradients_have_the_precision_of_the_base(route):
    c = routes.Contraction(C.x, C.weight, C.first, C.second, C.y, jax.lax.Precision.HIGH)

    def product(x, weight):
        return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=c.precision)

    def value(x, a, b):
        return routes.product(route, c, product, x, some(3, 4, 3), a, b).sum()

    program = str(jax.make_jaxpr(jax.grad(value, (0, 1, 2)))(some(0, 5, 3), some(1, 2, 3), some(2, 4, 2)))
    assert program.count("Precision.HIGH, Precision.HIGH)") == program.count("dot_general") > 3
