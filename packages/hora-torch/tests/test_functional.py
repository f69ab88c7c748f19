"""Numbers of the equations that goldens hold by chance alone."""

import pytest
import torch
from hora_spec import AdapterSpec, Factors, LayerShape, param_shapes
from hora_torch.functional import delta, factor_a, factor_b, factors, hora_linear, stacked
from hora_torch.hypernet import HoraHypernet
from torch._subclasses.fake_tensor import FakeTensorMode

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


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec(2),
        AdapterSpec(2, a_source="hypernetwork", residual=True),
        AdapterSpec(2, sharing="a", tie_a=True),
        AdapterSpec(2, sharing="b", residual=True, gate=0.5),
        AdapterSpec(2, sharing="none"),
    ],
    ids=str,
)
def test_everything_is_computed_on_the_device_of_the_parameters(spec, grouped):
    layer = LayerShape.attention(16, 4, num_kv_heads=2 if grouped else 4)
    with FakeTensorMode():  # says when an operation reads two devices, and needs no second one
        params = {key: torch.empty(shape, device="cuda") for key, shape in param_shapes(spec, layer).items()}
        x, weight = torch.empty(2, 3, 16, device="cuda"), torch.empty(16, 16, device="cuda")
        y = hora_linear(x, weight, None, factors(spec, layer, params)["q"], spec.scaling)
        found = [y, *delta(spec, layer, params).values()]
    assert {one.device.type for one in found} == {"cuda"}
