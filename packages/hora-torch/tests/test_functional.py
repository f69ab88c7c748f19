"""Numbers of the equations that goldens hold by chance alone."""

import pytest
import torch
from hora_spec import AdapterSpec, Factors, LayerShape
from hora_torch.functional import factor_a, factor_b, stacked
from hora_torch.hypernet import HoraHypernet

LAYER = LayerShape.attention(16, 4)


@pytest.mark.parametrize("gain", [0.5, 2.0, 3.0])
def test_generated_factors_are_as_large_as_the_gain(gain):
    def generated(gain):
        spec = AdapterSpec(2, a_source="hypernetwork", gain=gain)
        hypernet = HoraHypernet(spec, LAYER, name="x", seed=0)
        with torch.no_grad():
            for i, param in enumerate(hypernet.params().values()):
                param.normal_(generator=torch.Generator().manual_seed(i))
            return factor_a(spec, hypernet.params(), "q"), factor_b(spec, LAYER, hypernet.params(), "q")

    for one, other in zip(generated(1.0), generated(gain), strict=True):
        assert one.any()
        torch.testing.assert_close(other, gain * one)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_heads_that_own_their_a_stand_beside_each_other_in_their_own_dtype(dtype):
    a, b = torch.randn(4, 2, 16).to(dtype), torch.randn(4, 3, 2).to(dtype)
    left, right = stacked(Factors(a, b))
    assert left.dtype == right.dtype == dtype
    torch.testing.assert_close(right @ left, torch.cat(list(b @ a)))
