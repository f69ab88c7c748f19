"""One weight of codes at a time: what is read, tried, written and put back, without a model around it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hora_spec import HoraError, Layout
from hora_torch.quantized import CodedWeight, Rounding, backend_of
from torch import nn

from .quantised_models import (
    RowBackend,
    RowCodes,
    row_backend,  # noqa: F401, a fixture
)

ROWS, EMBED = 6, 8


class Exact(RowCodes):
    """Codes that are the numbers themselves; multiplies with `off` times what they stand for."""

    off = 1.0

    def quantize(self, weight):
        self.W_q, self.meta = nn.Parameter(weight.clone(), requires_grad=False), {"calls": 0}

    def dequantize(self):
        return self.W_q.detach().float()

    def forward(self, x):
        return self.off * super().forward(x)


class Losing(RowBackend):
    """Loses a part of each change."""

    def __init__(self, part):
        self.part = part

    def set_base_weight(self, peft_layer, weight_data):
        base = peft_layer.get_base_layer()
        base.quantize(weight_data + self.part * (base.dequantize() - weight_data))


def coded(kind=RowCodes, backend=None, weight=None, **attributes):
    torch.manual_seed(0)
    linear = nn.Linear(EMBED, ROWS)
    if weight is not None:
        linear.weight.data = weight
    module = kind(linear)
    for name, value in attributes.items():
        setattr(module, name, value)
    return CodedWeight(module, backend or RowBackend())


def addition(scaling=1.0, fill=None):
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, EMBED, generator=generator), torch.randn(ROWS, 2, generator=generator)
    if fill is not None:
        a, b = torch.full_like(a, fill), torch.ones_like(b)
    return [(Layout("(h k) d"), a, b, scaling)]


def plus(stored, additions=None, *, check=True, value=None):
    return stored.plus(stored.value() if value is None else value, additions or addition(), check=check, name="mine")


def update(scaling=1.0):
    ((_, a, b, scaling),) = addition(scaling)
    return scaling * b @ a


def parts(stored):
    return {name: copy.deepcopy(part) for name, part in stored.value().items()}


def assert_same(one, other):
    assert torch.equal(one["W_q"], other["W_q"])
    assert one["meta"].keys() == other["meta"].keys()
    assert all(
        torch.equal(torch.as_tensor(one["meta"][key]), torch.as_tensor(other["meta"][key])) for key in one["meta"]
    )


def test_a_sum_is_rounded_to_codes_and_what_it_lost_is_told():
    stored = coded()
    before, module = parts(stored), stored.module
    wanted = module.dequantize() + update()
    merged, rounding = plus(stored)
    assert_same(stored.value(), before)
    stored.write(merged)
    lost = float((module.dequantize() - wanted).norm())
    assert rounding.weight == pytest.approx(lost / float(wanted.norm()))
    assert rounding.delta == pytest.approx(lost / float(update().norm()))
    assert 0 < rounding.delta < 0.01
    assert str(rounding).startswith(f"{rounding.delta:.0%} of the update and ")


def test_parts_are_put_in_their_place_as_they_are_and_come_back_to_the_bit():
    stored = coded()
    own, before = stored.value(), parts(stored)
    merged, _ = plus(stored)
    for value in (merged, own):
        stored.write(value)
        assert all(getattr(stored.module, name) is part for name, part in value.items())
    assert_same(stored.value(), before)
    assert torch.equal(stored.bits(), before["W_q"])


def test_a_sum_starts_from_the_parts_that_are_given_whatever_the_module_holds():
    stored = coded()
    before = stored.value()
    expected, rounding = plus(stored)
    stored.write(plus(stored, addition(3.0))[0])
    again = plus(stored, value=before)
    assert_same(again[0], expected)
    assert again[1] == rounding


def test_what_changes_nothing_keeps_the_codes_and_loses_nothing():
    stored = coded()
    merged, rounding = plus(stored, addition(0.0))
    assert rounding == Rounding(0.0, 0.0)
    assert merged == stored.value()
    assert merged is not stored.value()


@pytest.mark.parametrize(("off", "message"), [(1.0, ""), (1.05, ""), (1.15, "not what it multiplies with")])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_codes_are_shown_to_be_what_the_module_multiplies_with(off, message, size):
    state = torch.get_rng_state()
    stored = coded(Exact, weight=size * torch.ones(ROWS, EMBED), off=off)
    torch.set_rng_state(state)
    if message:
        with pytest.raises(HoraError, match=message):
            plus(stored)
    else:
        torch.testing.assert_close(plus(stored)[0]["W_q"], size * torch.ones(ROWS, EMBED) + update())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_weight_of_zeros_is_merged_into_and_one_of_nan_is_not():
    torch.testing.assert_close(plus(coded(Exact, weight=torch.zeros(ROWS, EMBED)))[0]["W_q"].detach(), update())
    with pytest.raises(HoraError, match="or not finite"):
        plus(coded(Exact, weight=torch.full((ROWS, EMBED), torch.nan)))


@pytest.mark.parametrize("check", [True, False])
def test_a_safe_merge_loses_at_most_half_of_an_update(check):
    half, more = (coded(Exact, Losing(part), weight=torch.zeros(ROWS, EMBED)) for part in (0.5, 0.75))
    assert plus(half, addition(fill=1.0), check=check)[1].delta == 0.5
    if check:
        with pytest.raises(HoraError, match=r"loses 75% of the update.*\(spec M3\)"):
            plus(more, addition(fill=1.0))
    else:
        assert plus(more, addition(fill=1.0), check=False)[1].delta == pytest.approx(0.75)


def test_a_broken_adapter_is_named():
    with pytest.raises(HoraError, match="The adapter mine seems to be broken"):
        plus(coded(), addition(fill=torch.nan))


class Unknown(RowBackend):
    backend_name = "unknown"


class ReadOnly(RowBackend):
    supports_merge = False


@pytest.mark.parametrize("backend", [Unknown, ReadOnly])
def test_codes_of_a_library_that_is_not_known_or_does_not_write_are_refused(backend):
    with pytest.raises(HoraError, match=r"read and written.*RowCodes.*full dtype to merge.*export_lora"):
        coded(backend=backend())


def test_codes_that_are_elsewhere_are_refused():
    with pytest.raises(HoraError, match=r"are offloaded: load the base without offloading \(spec M1\)"):
        CodedWeight(coded().module.to("meta"), RowBackend())


class Failing(RowBackend):
    def __init__(self, way):
        setattr(self, way, self.fail)

    def fail(self, *args):
        raise LookupError("no kernel")


@pytest.mark.parametrize(("way", "what"), [("get_base_weight", "read"), ("set_base_weight", "requantised")])
def test_an_error_of_a_library_is_one_of_ours_with_a_way_out(way, what):
    stored = coded(backend=Failing(way))
    before = parts(stored)
    with pytest.raises(HoraError, match=rf"RowCodes \(hqq\) cannot be {what}, no kernel: load .* to merge"):
        plus(stored)
    assert_same(stored.value(), before)


class Other(RowBackend):
    """Writes codes of another form."""

    def set_base_weight(self, peft_layer, weight_data):
        base = peft_layer.get_base_layer()
        base.W_q, base.meta = nn.Parameter(weight_data, requires_grad=False), {"scale": torch.ones(ROWS, 1)}


def test_codes_that_are_stored_in_another_form_are_refused():
    with pytest.raises(HoraError, match="requantised codes are stored as before"):
        plus(coded(backend=Other()))


def test_parts_are_put_back_in_the_dtype_that_the_module_has_by_then():
    stored = coded(Exact)
    before = stored.value()
    stored.write(plus(stored)[0])
    stored.module.to(torch.bfloat16)
    stored.write(before)
    assert stored.module.W_q.dtype == torch.bfloat16
    assert torch.equal(stored.module.W_q, before["W_q"].to(torch.bfloat16))
    codes = coded()
    own = codes.value()
    codes.write(plus(codes)[0])
    codes.module.to(torch.bfloat16)
    codes.write(own)
    assert all(getattr(codes.module, name) is part for name, part in own.items())


class Watched(RowCodes):
    """Notes how it is called, changes its own state and saves itself, as libraries' modules do."""

    def __init__(self, linear):
        super().__init__(linear)
        self.seen, self.saved = [], []

    def forward(self, x):
        self.seen.append((self.training, self.bias is None, self.W_q.data_ptr()))
        self.meta["touched"] = len(self.seen)
        return super().forward(x)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.saved.append(prefix)
        super()._save_to_state_dict(destination, prefix, keep_vars)


def test_the_module_itself_is_not_touched_while_a_sum_is_tried():
    stored = coded(Watched)
    module, hooked = stored.module.eval(), []
    module.register_forward_hook(lambda *args: hooked.append("forward"))
    module.register_forward_pre_hook(lambda *args: hooked.append("before"))
    plus(stored)
    assert module.seen  # by twins, which share what is no dict
    assert {(training, bare) for training, bare, _ in module.seen} == {(True, True)}
    assert module.seen[0][2] == module.W_q.data_ptr()  # codes are not copied to be read
    assert not hooked
    assert not module.saved
    assert "touched" not in module.meta
    assert not module.training
    assert module.bias is not None
    module(torch.zeros(1, EMBED))
    assert hooked == ["before", "forward"]


class Packed(Watched):
    """As bitsandbytes on some processors: codes in an order of their own, until the module is saved."""

    def __init__(self, linear):
        super().__init__(linear)
        self.pack()

    def pack(self):
        self.W_q.data = self.W_q.data.flip(0)
        self.W_q.quant_state = SimpleNamespace(packing_format_for_cpu=True)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.W_q.quant_state.packing_format_for_cpu:
            self.W_q = nn.Parameter(self.W_q.data.flip(0), requires_grad=False)
            self.W_q.quant_state = SimpleNamespace(packing_format_for_cpu=False)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def quantize(self, weight):
        super().quantize(weight)
        self.W_q.quant_state = SimpleNamespace(packing_format_for_cpu=False)


def test_codes_that_are_packed_for_a_processor_are_read_in_order():
    plain, packed = coded(), coded(Packed)
    expected, _ = plus(plain)
    found, _ = plus(packed)
    assert torch.equal(found["W_q"], expected["W_q"])
    assert torch.equal(packed.bits(), plain.bits())
    assert packed.module.W_q.quant_state.packing_format_for_cpu


def test_a_module_and_its_codes_know_each_other_and_twins_are_forgotten():
    stored = coded(Packed)
    module = stored.module
    merged, _ = plus(stored)
    assert merged["W_q"].module is None
    stored.write(merged)
    assert module.W_q.module is module
    assert module.quant_state is module.W_q.quant_state


@pytest.mark.parametrize("linear", [nn.Linear(2, 2), nn.Module(), nn.LayerNorm(2)])
def test_plain_weights_are_no_codes(linear):
    assert backend_of(linear, {}) is None


def torchao(setting, group=None, mapping_type="SYMMETRIC"):
    from torchao import quantization

    options = {}
    if group is not None:
        kind = getattr(quantization.quant_primitives.MappingType, mapping_type)
        granularity = quantization.granularity.PerGroup(group)
        options = {"granularity": granularity}
        if setting.startswith("Intx"):
            options |= {"weight_dtype": torch.int4, "mapping_type": kind}
    model = nn.Sequential(nn.Linear(64, 32))
    quantization.quantize_(model, getattr(quantization, setting)(**options))
    return model[0]


def quanto():
    from optimum import quanto

    model = nn.Sequential(nn.Linear(64, 32))
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model[0]


def bitsandbytes():
    from bitsandbytes.nn import Linear4bit

    linear = Linear4bit(64, 32, quant_type="nf4")
    linear.load_state_dict(nn.Linear(64, 32).state_dict())
    linear.support_avx512bf16_for_cpu = False
    return linear.to("cpu")


def has_zeros(linear):
    """Whether a code other than zero stands for zero."""
    zeros = getattr(linear.weight, "zero_point", None)
    return zeros is not None and bool((zeros != 0).any())


LIBRARIES = {
    "torchao by rows": ("torchao", lambda: torchao("Int8WeightOnlyConfig")),
    "torchao by groups of eight bits": ("torchao", lambda: torchao("Int8WeightOnlyConfig", group=32)),
    "torchao by groups": ("torchao", lambda: torchao("IntxWeightOnlyConfig", group=32)),
    "torchao with zeros": ("torchao", lambda: torchao("IntxWeightOnlyConfig", group=32, mapping_type="ASYMMETRIC")),
    "torchao in floats": ("torchao", lambda: torchao("Float8WeightOnlyConfig")),
    "bitsandbytes": ("bitsandbytes", bitsandbytes),
    "quanto": ("optimum.quanto", quanto),
}


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.filterwarnings("ignore:.*torchao.*:UserWarning")
def test_codes_of_a_library_are_requantised_as_they_were_and_are_not_trained(name):
    library, load = LIBRARIES[name]
    pytest.importorskip(library, reason="optional: one of the libraries whose weights are adapted")
    torch.manual_seed(0)
    linear = load()
    stored = CodedWeight(linear, backend_of(linear, {}))
    before = stored.backend.get_base_weight(linear).detach().clone()
    a, b = torch.randn(2, 64) / 8, torch.randn(32, 2) / 8
    merged, rounding = plus(stored, [(Layout("(h k) d"), a, b, 1.0)])
    assert 0 < rounding.delta < 0.5
    if name == "bitsandbytes":  # where each knows the other, also while a sum is tried
        assert linear.weight.module is linear
        assert linear.quant_state is linear.weight.quant_state
    own, bits = stored.value(), stored.bits().clone()
    assert bits.element_size() == 1
    assert bits.numel() == linear.weight.numel()
    stored.write(merged)
    assert not torch.equal(stored.bits(), bits)
    assert has_zeros(linear) == (name == "torchao with zeros")
    assert (stored.backend.get_base_weight(linear) - before - b @ a).norm() <= 0.5 * (b @ a).norm()
    assert type(linear.weight) is type(own["weight"])
    assert not linear.weight.requires_grad
    stored.write(own)
    assert torch.equal(stored.backend.get_base_weight(linear), before)
    assert torch.equal(stored.bits(), bits)


def test_codes_of_other_libraries_are_peft_s_to_read():
    assert isinstance(backend_of(coded().module, {}), RowBackend)
    assert backend_of(nn.Bilinear(2, 2, 2), {}) is None
