"""Tests of the tests: mistakes in ways that the conformance kit cannot see, each planted and caught by a named test."""

import jax.numpy as jnp
import numpy as np
import pytest
from hora_jax import functional, joint, routes, trained
from hora_spec import AdapterSpec

from . import test_functional, test_joint


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


def fixed_a_trained(patch: pytest.MonkeyPatch) -> None:
    """A fixed A is one of the parameters that are trained."""
    patch.setattr(trained, "is_trained", lambda spec, name: True)


def joint_of_one_head(patch: pytest.MonkeyPatch) -> None:
    """A starts where the first head wants to read, whatever the others do."""
    honest, head_dim = joint._Trial.left, test_joint.SHAPES["q"][-1]

    def left(self, probes):
        first = {
            name: {p: np.where(np.arange(len(rows))[:, None] < head_dim, rows, 0) for p, rows in own.items()}
            for name, own in probes.items()
        }
        return honest(self, first)

    patch.setattr(joint._Trial, "left", left)
    patch.setattr(test_joint, "started", test_joint.started.__wrapped__)


def joint_scale_of_all_tokens(patch: pytest.MonkeyPatch) -> None:
    """The scale is that of a sum over tokens in place of their mean."""
    honest = joint._Trial.inputs

    def inputs(self, probes):
        return {
            name: {p: moments._replace(square=7 * moments.square) for p, moments in own.items()}
            for name, own in honest(self, probes).items()
        }

    patch.setattr(joint._Trial, "inputs", inputs)
    patch.setattr(test_joint, "started", test_joint.started.__wrapped__)


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
    (fixed_a_trained, test_joint.test_s6_an_optimiser_that_decays_never_sees_a_fixed_a, ()),
    (joint_of_one_head, test_joint.test_i7_a_spans_what_plain_differentiation_finds, (0, "q")),
    (joint_scale_of_all_tokens, test_joint.test_i7_the_scale_makes_a_read_as_strongly_as_lora_s, ()),
    (default_precision, PRECISION, (AdapterSpec(3),)),
]


@pytest.mark.parametrize(("plant", "test", "args"), CAUGHT, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_mistake_is_caught(plant, test, args, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test(*args)
