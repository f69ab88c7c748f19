"""Tests of the tests: mistakes in ways that the conformance kit cannot see, each planted and caught by a named test."""

import jax.numpy as jnp
import pytest
from hora_jax import functional, routes
from hora_spec import AdapterSpec

from . import test_functional


def narrow_sums(patch: pytest.MonkeyPatch) -> None:
    """Gradients of factors accumulate in the dtype of the activations."""

    def accumulate(c, to, one, two, *operands, like=None):
        return jnp.einsum(c.to(to, one, two), *operands, preferred_element_type=operands[0].dtype)

    patch.setattr(routes, "_accumulate", accumulate)


def rounded_gradients(patch: pytest.MonkeyPatch) -> None:
    """Gradients of factors are what JAX's own rules make of the cast, rounded to the dtype of the activations."""
    patch.setattr(routes, "branch", routes.plain)


def merged_in_sixteen_bits(patch: pytest.MonkeyPatch) -> None:
    """``route="merge"`` is obeyed in every dtype."""
    honest = routes.merges
    patch.setattr(routes, "merges", lambda route, *args: route == "merge" or honest(route, *args))


def default_precision(patch: pytest.MonkeyPatch) -> None:
    """Generation follows the precision that is set for the model."""
    patch.setattr(functional, "_einsum", jnp.einsum)


SUMS = test_functional.test_gradients_of_factors_are_summed_over_tokens_in_float32
SMALL = test_functional.test_a_delta_below_the_rounding_of_a_sixteen_bit_weight_is_not_lost
PRECISION = test_functional.test_generation_has_the_highest_precision_whatever_the_default
CAUGHT = [
    *(
        (plant, SUMS, ("branch", dtype, own))
        for plant in (narrow_sums, rounded_gradients)
        for dtype in test_functional.SIXTEEN_BITS
        for own in (False, True)
    ),
    *((merged_in_sixteen_bits, SMALL, ("merge", dtype)) for dtype in test_functional.SIXTEEN_BITS),
    (default_precision, PRECISION, (AdapterSpec(3),)),
]


@pytest.mark.parametrize(("plant", "test", "args"), CAUGHT, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_mistake_is_caught(plant, test, args, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test(*args)
