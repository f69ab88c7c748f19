"""What `product` is made of, seen alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hora_jax import routes

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
