"""Merging: one rounding of a float32 sum, refusals that change nothing, and a way back that loses no bit."""

import numpy as np
import peft
import pytest
import torch
from hora_spec import HoraError, Layout, Window, reference
from hora_torch import HoraConfig
from hora_torch.layer import HoraLayer
from hora_torch.merging import merged_weight
from hora_torch.stored import Fingerprint, PlainWeight, stored_weight
from torch import nn

from . import oracle

FORMS = {
    "linear": (Layout("(h k) d"), (6, 5)),
    "conv1d": (Layout("d (h k)"), (5, 6)),
    "fused rows": (Layout("(h k) d", Window(0, 6, 12)), (18, 5)),
    "fused columns": (Layout("d (h k)", Window(1, 3, 9)), (5, 18)),
    "rows by head": (Layout("(h k) d", Window(0, 4, 6, blocks=3)), (21, 5)),
    "columns by head": (Layout("d (h k)", Window(1, 0, 3, blocks=2)), (5, 18)),
}


def model(dtype=torch.bfloat16, **kwargs):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64, dtype=dtype))
    config = HoraConfig(r=4, target_modules=["0"], num_heads=4, init_weights=False, **kwargs)
    return peft.get_peft_model(base, config)


def layer(model):
    return next(module for module in model.modules() if isinstance(module, HoraLayer))


def given(shape, dtype, rank=2):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    return weight, torch.randn(rank, 5, generator=generator), torch.randn(6, rank, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_the_sum_is_that_of_the_reference_rounded_once(form, dtype):
    layout, shape = FORMS[form]
    weight, a, b = given(shape, dtype)
    a, b = (a.double(), b.double()) if dtype == torch.float64 else (a, b)
    merged = merged_weight(weight, [(layout, a, b, 0.5)])
    expected = reference.merge(weight.double().numpy(), 0.5 * b.double().numpy() @ a.double().numpy(), layout)
    # one rounding to dtype; float32 sums differ from float64 sums by a few units of float32 before it
    unit = torch.finfo(dtype).eps
    np.testing.assert_allclose(merged.double().numpy(), expected, rtol=unit, atol=4e-7 if unit > 1e-10 else 1e-15)
    outside = torch.ones(shape, dtype=torch.bool)
    outside[layout.index(outside.shape)] = False
    assert torch.equal(merged[outside], weight[outside])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [form for form, (layout, _) in FORMS.items() if layout.window])
def test_l4_rows_outside_the_window_keep_every_bit(form, dtype):
    layout, shape = FORMS[form]
    weight, a, b = given(shape, dtype)
    weight = -torch.zeros_like(weight)  # adding zero would make it positive
    outside = torch.ones(shape, dtype=torch.bool)
    outside[layout.index(shape)] = False
    assert torch.signbit(merged_weight(weight, [(layout, a, b, 0.5)]))[outside].all()


def test_a_thousand_cycles_in_bfloat16_leave_the_base_identical():
    adapted = model()
    weight = layer(adapted).base_layer.weight
    before = weight.detach().clone()
    for _ in range(1000):
        adapted.merge_adapter()
        adapted.unmerge_adapter()
    assert layer(adapted).base_layer.weight is weight
    assert torch.equal(weight, before)


def test_where_somebody_else_wrote_to_one_weight_no_layer_is_unmerged(families):
    adapted = oracle.adapted(families["llama"])
    adapted.merge_adapter()
    *_, last = (module for module in adapted.modules() if isinstance(module, HoraLayer))
    last.get_base_layer().weight.data[0, 0] += 1
    before = oracle.snapshot(adapted)
    with pytest.raises(HoraError, match="weight was written to since"):
        adapted.unmerge_adapter()
    oracle.assert_unchanged(adapted, before)


def test_merging_the_same_adapter_twice_is_refused_with_a_warning():
    adapted = model()
    adapted.merge_adapter()
    merged = layer(adapted).base_layer.weight.detach().clone()
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        adapted.merge_adapter()
    assert torch.equal(layer(adapted).base_layer.weight, merged)
    adapted.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        adapted.unmerge_adapter()


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
def test_adapters_merged_one_after_the_other_are_summed_before_rounding():
    adapted = model()
    adapted.add_adapter("other", HoraConfig(r=2, target_modules=["0"], num_heads=2, init_weights=False))
    adapted.merge_adapter(["default", "other"])
    together = layer(adapted).base_layer.weight.detach().clone()
    adapted.unmerge_adapter()
    adapted.merge_adapter(["default"])
    adapted.merge_adapter(["other"])
    assert torch.equal(layer(adapted).base_layer.weight, together)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_non_finite_delta_is_refused_and_changes_nothing(safe_merge):
    adapted = model()
    before = layer(adapted).base_layer.weight.detach().clone()
    with torch.no_grad():
        layer(adapted).hora_hyper["default"].get_parameter("b_in")[0, 0] = torch.inf
    with pytest.raises(HoraError, match="adapter default seems to be broken"):
        adapted.merge_adapter(safe_merge=safe_merge)
    assert torch.equal(layer(adapted).base_layer.weight, before)
    assert not layer(adapted).merged


def test_an_overflow_of_the_base_dtype_is_refused():
    weight, a, b = given((6, 5), torch.float16)
    with pytest.raises(HoraError, match=r"range of torch\.float16"):
        merged_weight(weight, [(Layout(), a * 1e3, b * 1e3, 1.0)])
    weight, a, b = given((6, 5), torch.float32)
    with pytest.raises(HoraError, match=r"range of torch\.float32"):
        merged_weight(weight, [(Layout(), a * 1e20, b * 1e20, 1.0)])


def test_a_merged_model_can_change_dtype_before_it_is_unmerged():
    adapted = model(torch.float32)
    before = layer(adapted).base_layer.weight.detach().clone()
    adapted.merge_adapter()
    adapted.to(torch.bfloat16)
    adapted.unmerge_adapter()
    assert torch.equal(layer(adapted).base_layer.weight, before.to(torch.bfloat16))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "timm-vit", "mha", "mha-cross"])
def test_disabling_merged_adapters_brings_the_base_back_and_enabling_them_the_adapters(families, name):
    family = families[name]
    adapted, base, inputs = oracle.adapted(family), family.model(), family.inputs()
    expected, without = oracle.evaluate(adapted, inputs), oracle.evaluate(base, inputs)
    oracle.differ(expected, without)
    adapted.merge_adapter()
    with adapted.disable_adapter():
        oracle.agree(oracle.evaluate(adapted, inputs), without)
        weights = {key.replace(".base_layer", ""): value for key, value in adapted.state_dict().items()}
        for key, value in base.state_dict().items():
            assert torch.equal(weights[f"base_model.model.{key}"], value), key
    oracle.agree(oracle.evaluate(adapted, inputs), expected)


@pytest.mark.parametrize("size", [1, 60, 80, 1 << 20])
@pytest.mark.parametrize("form", FORMS)
def test_the_size_of_chunks_does_not_show(form, size, monkeypatch):
    from hora_torch import merging

    layout, shape = FORMS[form]
    weight, a, b = given(shape, torch.bfloat16)
    both = [(layout, a, b, 0.5), (layout, b.T[:, :5].contiguous(), a.T.repeat(2, 1)[:6].contiguous(), 2.0)]
    whole = merged_weight(weight.float(), both).bfloat16()
    monkeypatch.setattr(merging, "_CHUNK_BYTES", size)
    torch.testing.assert_close(merged_weight(weight, both), whole, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32])
def test_a_base_that_cannot_hold_a_sum_is_refused(dtype):
    weight, a, b = given((6, 5), torch.float32)
    with pytest.raises(HoraError, match=r"floating base of 16 bits or more.*export_lora"):
        merged_weight(weight.to(dtype), [(Layout(), a, b, 1.0)])


@pytest.mark.parametrize("broken", ["a", "b"])
def test_one_factor_that_is_not_finite_is_enough_to_refuse(broken):
    weight, a, b = given((6, 5), torch.float32)
    (a if broken == "a" else b)[1, 1] = torch.nan
    with pytest.raises(HoraError, match="its factors are not"):
        merged_weight(weight, [(Layout(), a, b, 1.0)])


def test_a_sum_just_out_of_range_is_refused_without_looking_at_every_entry():
    weight, a, b = torch.zeros(6, 5), torch.zeros(1, 5), torch.zeros(6, 1)
    a[0, 3], b[2, 0] = 2e19, 2e19
    with pytest.raises(HoraError, match=r"range of torch\.float32"):
        merged_weight(weight, [(Layout(), a, b, 1.0)])
    a[0, 3] = 1e19
    assert merged_weight(weight, [(Layout(), a, b, 1.0)])[2, 3].item() == pytest.approx(2e38)


def test_a_base_that_is_not_finite_is_refused_when_every_entry_is_looked_at():
    weight, a, b = given((6, 5), torch.float32)
    weight[0, 0] = torch.inf
    assert merged_weight(weight, [(Layout(), a, b, 1.0)])[0, 0] == torch.inf
    with pytest.raises(HoraError, match="the base is not finite"):
        merged_weight(weight, [(Layout(), a, b, 1.0)], check=True)


def test_safe_merge_looks_at_every_entry_of_the_base():
    adapted = model(torch.float32)
    with torch.no_grad():
        layer(adapted).base_layer.weight[0, 0] = torch.inf
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    with pytest.raises(HoraError, match="the base is not finite"):
        adapted.merge_adapter(safe_merge=True)
    assert not layer(adapted).merged


@pytest.mark.parametrize("inplace", [True, False])
def test_a_base_that_changed_between_two_merges_is_the_one_that_is_merged_into_and_restored(inplace):
    adapted = model(torch.float32)
    weight = layer(adapted).base_layer.weight
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    if inplace:
        weight.data.mul_(2)
    else:
        weight.data = 2 * weight.data
    changed = weight.detach().clone()
    adapted.merge_adapter()
    torch.testing.assert_close(weight, changed + layer(adapted).get_delta_weight("default"))
    adapted.unmerge_adapter()
    assert torch.equal(weight, changed)


class Stubborn(nn.Parameter):
    """A parameter that keeps its value, as those of some quantised libraries do."""

    data = property(lambda self: self.detach(), lambda self, value: None)


def test_only_a_plain_parameter_that_is_here_is_merged_into():
    module = nn.Linear(2, 2)
    assert stored_weight(module, "weight").bits().data_ptr() == module.weight.data_ptr()
    with pytest.raises(HoraError, match="got a NoneType as other of Linear"):
        stored_weight(module, "other")
    with pytest.raises(HoraError, match="weight of Linear is offloaded"):
        stored_weight(nn.Linear(2, 2, device="meta"), "weight")
    stubborn = PlainWeight(module, "weight")
    module.weight = stubborn.param = Stubborn(torch.zeros(2, 2))
    with pytest.raises(HoraError, match="got a Stubborn as weight"):
        stored_weight(module, "weight")
    with pytest.raises(HoraError, match="kept its own value"):
        stubborn.write(torch.ones(2, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_fingerprint_tells_one_changed_bit_and_nothing_else(dtype):
    def fingerprint(tensor):
        module = nn.Linear(1, 1)
        module.weight = nn.Parameter(tensor)
        return Fingerprint.of(PlainWeight(module, "weight"))

    weight = torch.randn(6, 5, dtype=dtype)
    copy, turned = weight.clone(), weight.T.contiguous().T
    assert fingerprint(weight) == fingerprint(copy) == fingerprint(turned)
    copy[2, 3] = torch.nextafter(copy[2, 3], torch.tensor(torch.inf, dtype=dtype))
    assert fingerprint(weight) != fingerprint(copy)
