"""Merging into codes: what is lost is said, what was there comes back to the bit, and what cannot be is refused."""

import copy
import gc
import pickle

import peft
import pytest
import torch
import transformers as tf
from hora_spec import HoraError, LayerShape, reference
from hora_torch import verify
from hora_torch.quantized import CodedWeight
from torch import nn

from . import oracle
from .oracle import config, differ, evaluate, parameters
from .quantised_models import (
    BASES,
    MARKS,
    MERGING,
    OWN,
    SOME,
    adapt,
    assert_same,
    changed,
    close,
    codes,
    flat,
    inputs,
    layers,
    multiplies_with,
    quantised,
    row_backend,  # noqa: F401, a fixture
    save_float_model,
)

pytestmark = MARKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float model on disk, which every base quantises."""
    directory = tmp_path_factory.mktemp("base")
    save_float_model(directory)
    return directory


@pytest.mark.parametrize("name", MERGING)
def test_merged_codes_stand_for_the_sum_and_the_loss_is_told(name, folder):
    model = adapt(name, folder)
    before = {path: multiplies_with(layer.get_base_layer()) for path, layer in layers(model).items()}
    with pytest.warns(UserWarning, match=r"rounded to their codes, which loses up to \d+% of the update"):
        model.merge_adapter()
    for spec, sites, params in oracle.current(model).values():
        deltas = reference.delta(spec, LayerShape({p: site.projection for p, site in sites.items()}), params)
        for p, site in sites.items():
            path = f"base_model.model.{site.module}"
            layer = model.get_submodule(path)
            wanted = before[path] + torch.from_numpy(deltas[p]).float()
            lost = (multiplies_with(layer.get_base_layer()) - wanted).norm()
            told = layer.rounding["weight"]
            assert told.weight == pytest.approx(float(lost / wanted.norm()), rel=1e-2, abs=1e-6)
            assert told.delta == pytest.approx(float(lost / (wanted - before[path]).norm()), rel=1e-2, abs=1e-5)
            assert 0 < told.delta < 1.2


@pytest.mark.parametrize("name", MERGING)
def test_unmerging_restores_every_bit_of_the_codes(name, folder):
    model = adapt(name, folder)
    before = codes(model)
    for _ in range(3):
        model.merge_adapter()
        merged = codes(model)
        assert changed(merged, before)
        model.unmerge_adapter()
        assert_same(codes(model), before)
    assert not any(layer.rounding for layer in layers(model).values())


@pytest.mark.parametrize("name", MERGING)
def test_evaluation_between_merging_and_unmerging_changes_nothing(name, folder):
    model, base = adapt(name, folder), evaluate(quantised(name, folder), inputs())
    expected = evaluate(model, inputs())
    model.merge_adapter()
    merged = evaluate(model, inputs())
    differ(merged, base)
    close(merged - base, expected - base, 1.0)
    with model.disable_adapter():
        assert torch.equal(evaluate(model, inputs()), base)
    model.merge_adapter()
    assert torch.equal(evaluate(model, inputs()), merged)
    model.unmerge_adapter()
    assert torch.equal(evaluate(model, inputs()), expected)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
def test_adapters_are_summed_before_they_are_rounded(name, folder):
    model = adapt(name, folder)
    model.add_adapter("other", config(seed=3, hora_alpha=0.2))
    model.eval().merge_adapter(["default", "other"])
    together = codes(model)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    assert changed(codes(model), together)
    model.merge_adapter(["other"])
    assert_same(codes(model), together)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning")
def test_unloading_keeps_the_base_quantised_and_its_biases(name, folder):
    model = adapt(name, folder)
    kinds = {path: type(layer.get_base_layer()) for path, layer in layers(model).items()}
    model.merge_adapter()
    expected = evaluate(model, inputs())
    merged = model.merge_and_unload()
    assert torch.equal(evaluate(merged, inputs()), expected)
    fresh = quantised(name, folder)
    for path, kind in kinds.items():
        linear = merged.get_submodule(path.removeprefix("base_model.model."))
        assert type(linear) is kind
        assert torch.equal(linear.bias, fresh.get_submodule(path.removeprefix("base_model.model.")).bias)


@pytest.mark.parametrize("name", SOME[:3])
def test_a_merged_base_is_saved_and_loaded_by_transformers(name, folder, tmp_path):
    merged = adapt(name, folder).merge_and_unload()
    merged.save_pretrained(tmp_path)
    expected = evaluate(merged, inputs())
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    for linear in loaded.modules():
        linear.support_avx512bf16_for_cpu = False  # of bitsandbytes, which computes with other floats there
    assert torch.equal(evaluate(loaded, inputs()), expected)


@pytest.mark.parametrize("name", SOME)
def test_a_copy_of_a_merged_model_is_unmerged_alone(name, folder):
    model = adapt(name, folder)
    before = codes(model)
    ways = {copy.deepcopy: BASES[name].copies, lambda layer: pickle.loads(pickle.dumps(layer)): BASES[name].pickles}
    for duplicate, works in ways.items():
        if not works:
            continue
        model.merge_adapter()
        merged, path = codes(model), next(iter(layers(model)))
        layer = duplicate(model.get_submodule(path))
        layer.unmerge()
        for key, value in layer.get_base_layer().state_dict().items():
            assert_same({key: flat(value)}, {key: before[f"{path}.{key}"]})
        assert_same(codes(model), merged)
        model.unmerge_adapter()
        assert_same(codes(model), before)


@pytest.mark.parametrize("name", SOME)
def test_no_weight_stays_in_memory_as_floats(name, folder):
    def dense():
        found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]
        return {id(thing) for thing in found if thing.is_floating_point() and thing.numel() >= 32 * 64}

    model = adapt(name, folder)
    evaluate(model, inputs())
    before = dense()
    model.merge_adapter()
    evaluate(model, inputs())
    assert not dense() - before
    model.unmerge_adapter()
    assert not dense() - before


@pytest.mark.parametrize("name", SOME)
def test_an_update_that_is_lost_in_rounding_is_refused_by_a_safe_merge(name, folder):
    model = adapt(name, folder)
    for key, param in parameters(model).items():
        if ".b_out." in key:
            param.data *= 1e-4
    before = codes(model)
    for act in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(HoraError, match=r"loses \d+% of the update.*full dtype to merge.*export_lora"):
            act(safe_merge=True)
        assert not any(layer.merged for layer in layers(model).values())
        assert_same(codes(model), before)
    with pytest.warns(UserWarning, match=r"loses up to \d+% of the update"):
        model.merge_adapter()


@pytest.mark.parametrize("name", SOME)
def test_an_adapter_that_changes_nothing_leaves_the_codes(name, folder):
    model = peft.get_peft_model(quantised(name, folder), config(init_weights=True)).eval()
    before = codes(model)
    model.merge_adapter(safe_merge=True)
    assert_same(codes(model), before)


class Failure(Exception):
    """Of a library."""


def fails(backend, holder, floats):
    raise Failure("no kernel")


def forgets(backend, holder, floats):
    """As optimum-quanto does when its weights' data are assigned."""


def writes_floats(backend, holder, floats):
    """As torchao does with a config that does not match the module."""
    base = holder.get_base_layer()
    setattr(base, "W_q" if hasattr(base, "W_q") else "weight", nn.Parameter(floats, requires_grad=False))


@pytest.mark.parametrize("way", [fails, writes_floats])
@pytest.mark.parametrize("name", ["bitsandbytes nf4", "torchao int8", "quanto int8", OWN])
def test_a_merge_that_fails_in_the_second_layer_leaves_the_first_alone(name, way, folder, monkeypatch):
    model = adapt(name, folder)
    before, expected = codes(model), evaluate(model, inputs())
    before = before if "nf4" not in name else None  # which evaluation may have packed
    kind = type(next(iter(layers(model).values())).quantization_backend)
    real, calls = kind.set_base_weight, []

    def write(backend, holder, floats):
        calls.append(holder)
        (way if len(calls) > 2 else real)(backend, holder, floats)

    monkeypatch.setattr(kind, "set_base_weight", write)
    with pytest.raises(HoraError, match="cannot be requantised, no kernel" if way is fails else "stored as before"):
        model.merge_adapter()
    assert len(calls) == 3
    assert not any(layer.merged for layer in layers(model).values())
    assert before is None or not changed(codes(model), before)
    assert torch.equal(evaluate(model, inputs()), expected)


@pytest.mark.parametrize("name", SOME)
def test_codes_that_are_not_what_the_base_multiplies_with_are_refused(name, folder, monkeypatch):
    model = adapt(name, folder)
    before = codes(model)
    kind = type(next(iter(layers(model).values())).quantization_backend)
    real = kind.get_base_weight
    monkeypatch.setattr(kind, "get_base_weight", lambda backend, base: real(backend, base).flip(0))
    with pytest.raises(HoraError, match="are not what it multiplies with"):
        model.merge_adapter()
    assert_same(codes(model), before)


def test_a_backend_that_forgets_what_it_writes_is_told_by_what_is_lost(folder, monkeypatch):
    model = adapt(OWN, folder)
    monkeypatch.setattr(type(next(iter(layers(model).values())).quantization_backend), "set_base_weight", forgets)
    with pytest.raises(HoraError, match="loses 100% of the update"):
        model.merge_adapter(safe_merge=True)
    with pytest.warns(UserWarning, match="loses up to 100% of the update"):
        model.merge_adapter()


@pytest.mark.parametrize("name", [name for name, base in BASES.items() if not base.merges])
def test_codes_that_cannot_be_written_are_refused_with_a_way_out(name, folder):
    model = adapt(name, folder)
    expected = evaluate(model, inputs())
    for act in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(HoraError, match=r"known codes.*PackedLinear.*full dtype.*export_lora"):
            act()
        assert torch.equal(evaluate(model, inputs()), expected)


def test_a_backend_without_a_way_to_write_is_refused_with_a_way_out():
    backend = peft.utils.quantization_utils.ForwardOnlyQuantizationBackend("gptq")
    with pytest.raises(HoraError, match=r"read and written.*Linear \(gptq\).*full dtype.*export_lora"):
        CodedWeight(nn.Linear(2, 2), backend)


@pytest.mark.parametrize("name", SOME)
def test_codes_that_somebody_else_wrote_are_not_overwritten(name, folder):
    model = adapt(name, folder)
    model.merge_adapter()
    *_, layer = layers(model).values()
    theirs = layer.stored("weight")
    with torch.no_grad():
        added = layer._additions(["default"])["weight"]
        theirs.write(theirs.plus(theirs.value(), added, check=False, name="theirs")[0])
    for act in (layer.unmerge, model.unmerge_adapter):
        with pytest.raises(HoraError, match="weight was written to since"):
            act()
        assert all(layer.merged for layer in layers(model).values())


@pytest.mark.parametrize("name", [name for name in SOME if BASES[name].library == "torchao"])
def test_a_merged_model_can_change_dtype_before_it_is_unmerged(name, folder):
    model, other = adapt(name, folder), adapt(name, folder)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    other.to(torch.bfloat16)
    assert_same(codes(model), codes(other))


@pytest.mark.parametrize("name", SOME)
def test_verify_tells_a_rounded_merge_from_a_wrong_one(name, folder):
    model = adapt(name, folder)
    report = verify(model, inputs())
    report.require()
    assert [finding.verdict for finding in report.findings if "unmerging" in finding.question] == ["ok"]


@pytest.mark.parametrize("name", [name for name in MERGING if "bitsandbytes" in name])
def test_a_base_that_was_evaluated_before_it_was_adapted_is_merged_and_restored(name, folder):
    """Some processors have an order of their own for codes, into which bitsandbytes brings them in evaluation."""
    base = quantised(name, folder, packs=True)
    plain = evaluate(base, inputs())
    model = peft.get_peft_model(base, config(hora_alpha=0.2)).eval()
    expected = evaluate(model, inputs())
    with pytest.warns(UserWarning, match=r"which loses up to \d\d?% of the update"):
        model.merge_adapter()
    close(evaluate(model, inputs()) - plain, expected - plain, 0.9)
    model.unmerge_adapter()
    assert torch.equal(evaluate(model, inputs()), expected)
