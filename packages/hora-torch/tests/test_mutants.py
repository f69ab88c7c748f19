"""Tests of the tests: mistakes in ways that the conformance kit cannot see, each planted and caught by a named test."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hora_torch import adapted_linear, attention, hypernet, layer, linear, sites, trials
from torch import Tensor

from . import test_attention, test_hypernet, test_joint, test_linear, test_merge, test_peft, test_sharing
from .conftest import FAMILIES

Plant = Callable[[pytest.MonkeyPatch], None]


def k_window_planned(patch: pytest.MonkeyPatch) -> None:
    """The plan gives v the rows of k."""
    honest = sites._of_multihead

    def of_multihead(*args):
        for found in honest(*args):
            window = found.site.layout.window
            if found.role == "v":
                start = 2 * window.start - window.stop
                layout = replace(found.site.layout, window=replace(window, start=start, stop=window.start))
                found = found._replace(site=replace(found.site, layout=layout))
            yield found

    patch.setattr(sites, "_of_multihead", of_multihead)


def k_window_added(patch: pytest.MonkeyPatch) -> None:
    """The branch of v is added to the columns of k."""
    honest = layer._branches

    def branches(attached, made, keep_rate):
        found = honest(attached, made, keep_rate)
        if "v" in found:
            _, _, _, start, stop = found["v"]
            found["v"] = found["v"]._replace(start=2 * start - stop, stop=start)
        return found

    patch.setattr(layer, "_branches", branches)


def k_window_multiplied(patch: pytest.MonkeyPatch) -> None:
    """The value is projected by the rows of k."""
    honest = attention.HoraMultiheadAttention._weight
    wrong = {"q": "q", "k": "k", "v": "k"}
    patch.setattr(attention.HoraMultiheadAttention, "_weight", lambda self, part: honest(self, wrong[part]))


def merged_in_sixteen_bits(patch: pytest.MonkeyPatch) -> None:
    """``route="merge"`` is obeyed in every dtype."""
    honest = linear._merges
    patch.setattr(linear, "_merges", lambda route, x, keep: route == "merge" or honest(route, x, keep))


def generated_in_sixteen_bits(patch: pytest.MonkeyPatch) -> None:
    """Factors are generated as autocast would have it."""
    patch.setattr(hypernet, "autocast_enabled", lambda param: False)


def shared_mask(patch: pytest.MonkeyPatch) -> None:
    """All adapters drop the same inputs."""

    def drop(self: Tensor, rate: float) -> Tensor:
        same = torch.rand(self.shape, generator=torch.Generator().manual_seed(0)) < rate
        return self.copy_(same)

    patch.setattr(Tensor, "bernoulli_", drop)


def first_names_first(patch: pytest.MonkeyPatch) -> None:
    """Samples of a mixed batch are taken to be sorted by adapter."""
    for kind in (adapted_linear.HoraLinear, attention.HoraMultiheadAttention):
        name = "_mixed" if kind is adapted_linear.HoraLinear else "_project_mixed"
        honest = getattr(kind, name)

        def mixed(self, *args, honest=honest, at=1 if name == "_mixed" else 2):
            order = list(dict.fromkeys(args[at]))
            return honest(self, *args[:at], sorted(args[at], key=order.index), *args[at + 1 :])

        patch.setattr(kind, name, mixed)


def last_two_swapped(patch: pytest.MonkeyPatch) -> None:
    """The second and the third sample of a mixed batch exchange their adapters, which no batch of two can show."""
    honest = layer.HoraLayer._check_mixed

    def check(self, batch, names):
        honest(self, batch, names)
        names[1:3] = names[1:3][::-1]

    patch.setattr(layer.HoraLayer, "_check_mixed", check)


def left_merged(patch: pytest.MonkeyPatch) -> None:
    """Disabling adapters does not take merged ones out of the weights."""
    patch.setattr(layer.HoraLayer, "enable_adapters", layer.BaseTunerLayer.enable_adapters)


def fixed_a_trained(patch: pytest.MonkeyPatch) -> None:
    """A fixed A is a parameter like any other."""
    patch.setattr(hypernet, "is_trained", lambda spec, key: True)


def joint_of_one_head(patch: pytest.MonkeyPatch) -> None:
    """A starts where the first head wants to read, whatever the others do."""
    honest = trials.Trial.left

    def left(self, probes):
        dims = {net.name: {p: shape.head_dim for p, shape in net.layer.items()} for net in self.hypernets.values()}
        first = {
            name: {p: np.where(np.arange(len(rows))[:, None] < dims[name][p], rows, 0) for p, rows in own.items()}
            for name, own in probes.items()
        }
        return honest(self, first)

    patch.setattr(trials.Trial, "left", left)


def joint_scale_of_all_tokens(patch: pytest.MonkeyPatch) -> None:
    """The scale is that of a sum over tokens in place of their mean."""
    honest = trials.Trial.inputs

    def inputs(self, probes):
        return {
            name: {p: moments._replace(square=7 * moments.square) for p, moments in own.items()}
            for name, own in honest(self, probes).items()
        }

    patch.setattr(trials.Trial, "inputs", inputs)


BOTH = ("q", "v")
CAUGHT: list[tuple[Plant, Callable[..., Any], tuple[Any, ...]]] = [
    (k_window_planned, test_attention.test_self_attention_adds_each_update_to_its_own_projection, (BOTH,)),
    (k_window_planned, test_attention.test_merging_changes_the_rows_of_the_adapted_projection_alone, ("v",)),
    (k_window_added, test_attention.test_self_attention_adds_each_update_to_its_own_projection, (BOTH,)),
    (k_window_multiplied, test_attention.test_cross_attention_adds_each_update_to_its_own_projection, (BOTH, {})),
    *(
        (
            merged_in_sixteen_bits,
            test_linear.test_a_delta_below_the_rounding_of_a_sixteen_bit_weight_is_not_lost,
            ("merge", dtype, autocast, grad),
        )
        for dtype in (torch.bfloat16, torch.float16)
        for autocast in (False, True)
        for grad in (False, True)
    ),
    (
        generated_in_sixteen_bits,
        test_hypernet.test_factors_and_their_gradients_inside_autocast_are_those_outside,
        (test_hypernet.SPECS["shared"], torch.bfloat16),
    ),
    (
        generated_in_sixteen_bits,
        test_hypernet.test_a_merge_inside_autocast_is_the_merge_outside,
        ("full", torch.bfloat16),
    ),
    (fixed_a_trained, test_sharing.test_s6_a_fixed_a_is_no_parameter, (FAMILIES["llama"],)),
    (joint_of_one_head, test_joint.test_i7_a_spans_what_plain_differentiation_finds, (FAMILIES["llama"],)),
    (joint_scale_of_all_tokens, test_joint.test_i7_the_scale_makes_a_read_as_strongly_as_lora_s, (FAMILIES,)),
    *(
        (plant, test, (FAMILIES, name))
        for plant, test in (
            (
                shared_mask,
                test_peft.test_adapters_that_cancel_leave_noise_in_training_since_each_drops_inputs_of_its_own,
            ),
            (first_names_first, test_peft.test_each_of_three_samples_gets_its_adapter_in_any_order),
            (last_two_swapped, test_peft.test_each_of_three_samples_gets_its_adapter_in_any_order),
            (
                left_merged,
                test_merge.test_disabling_merged_adapters_brings_the_base_back_and_enabling_them_the_adapters,
            ),
        )
        for name in ("llama", "timm-vit", "mha-cross")
    ),
]


@pytest.mark.parametrize(("plant", "test", "args"), CAUGHT, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_mistake_is_caught(plant, test, args, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test(*args)
