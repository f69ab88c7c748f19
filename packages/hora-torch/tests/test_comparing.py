"""Outputs are compared by numbers that can be told by hand."""

import pytest
import torch
from hora_torch.comparing import Outputs, one_rounding_away


def outputs(effect=1.0, noise=0.0, off=0.0, size=1.0, half=False, restored=True, lost=0.0):
    """Outputs of norm `size`, which differ by so much."""
    base, adapted, again, merged = (torch.tensor([size, by], dtype=torch.float64) for by in (effect, 0, noise, off))
    return Outputs(base, adapted, again, merged, half, restored, lost)


def never():
    raise AssertionError("rounding is asked only where merging is off")


TOLD = {
    "equal": ({}, "ok"),
    "off by a thousandth of the effect": ({"effect": 10.0, "off": 0.01}, "ok"),
    "off by more": ({"effect": 10.0, "off": 0.0102}, "wrong"),
    "off by the rounding of large outputs": ({"size": 100.0, "off": 0.0019}, "ok"),
    "off by more than rounding of large outputs": ({"size": 100.0, "off": 0.0021}, "wrong"),
    "off by half the effect": ({"off": 0.5}, "wrong"),
    "off by half the effect in 16 bits": ({"effect": 2.0, "off": 1.0, "half": True}, "ok"),
    "off by more in 16 bits": ({"effect": 2.0, "off": 1.1, "half": True}, "wrong"),
    "a small effect in 16 bits": ({"effect": 1e-6, "half": True}, "ok"),
    "answers that differ by half the effect in 16 bits": ({"effect": 2.0, "noise": 1.0, "half": True}, "ok"),
    "answers that differ": ({"noise": 0.0011}, "in two ways"),
    "answers that differ in 16 bits": ({"effect": 2.0, "noise": 1.1, "half": True}, "in two ways"),
    "answers that are no numbers": ({"noise": torch.nan}, "in two ways"),
    "an effect of rounding": ({"effect": 9e-5}, "no more than rounding"),
    "an effect beyond rounding": ({"effect": 1.1e-4}, "ok"),
    "no effect on nothing": ({"effect": 0.0, "size": 0.0}, "ok"),
    "codes that lose some": ({"off": 0.5, "lost": 0.3}, "rounding to codes loses up to 30% of the update"),
    "codes that lose nothing that counts": ({"lost": 0.3}, "ok"),
}


@pytest.mark.parametrize("case", TOLD)
@pytest.mark.parametrize("restored", [True, False])
def test_a_merge_is_measured_by_what_the_adapters_change(case, restored):
    differences, expected = TOLD[case]
    seen = outputs(**differences, restored=restored)
    verdict, detail = seen.compared(lambda: 0.0) if expected not in ("ok", "in two ways") else seen.compared(never)
    assert (verdict == expected) if expected in ("ok", "wrong") else (verdict == "unknown" and expected in detail)
    if verdict == "wrong":
        assert f"{differences['off'] / differences.get('effect', 1.0):.2g} of the update's effect" in detail


ROUNDING = {
    "as much as eight roundings": ({"off": 8.0}, "so much does rounding alone"),
    "less than eight roundings": ({"off": 4.0}, "so much does rounding alone"),
    "more than eight roundings": ({"off": 8.5}, "wrong"),
    "not restored": ({"off": 8.0, "restored": False}, "wrong"),
    "16 bits": ({"off": 8.0, "half": True}, "wrong"),
    "codes": ({"off": 8.5, "lost": 0.5}, "loses up to 50%"),
}


@pytest.mark.parametrize("case", ROUNDING)
def test_a_model_that_amplifies_rounding_is_no_alarm(case):
    differences, expected = ROUNDING[case]
    verdict, detail = outputs(**differences).compared(lambda: 1.0)
    assert verdict == expected if expected == "wrong" else (verdict == "unknown" and expected in detail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_number_moves_by_one_rounding_up_or_down(dtype):
    state, y = torch.get_rng_state(), torch.linspace(-3, 3, 50, dtype=dtype)
    moved = one_rounding_away(None, None, y)
    down, up = (y.nextafter(torch.full_like(y, side * torch.inf)) for side in (-1, 1))
    assert torch.equal((moved == up) | (moved == down), torch.ones(50, dtype=torch.bool))
    assert 10 < int((moved == up).sum()) < 40
    assert torch.equal(one_rounding_away(None, None, y), moved)
    assert torch.equal(torch.get_rng_state(), state)
    several = (y, None)
    assert one_rounding_away(None, None, several) is several
