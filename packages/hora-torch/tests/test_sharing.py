"""What may be shared: a fixed A, one A for all projections, gates; and what LoRA is among them."""

import hora_torch
import peft
import pytest
import torch
from hora_spec import PRESETS, HoraError, is_trained
from hora_torch import HoraConfig
from hora_torch.layer import HoraLayer

FIXED = {"r": 3, **PRESETS["joint"].fields}


@pytest.fixture
def llama(families):
    return families["llama"]


def adapted(family, **kwargs):
    return peft.get_peft_model(family.model(), HoraConfig(**kwargs))


def train(model, inputs, steps=3, **options):
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)
    torch.manual_seed(0)
    for _ in range(steps):
        optimiser.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimiser.step()
    return optimiser


def hypernets(model):
    return [
        module.hora_hyper["default"]
        for module in model.modules()
        if isinstance(module, HoraLayer) and module.hora_hyper
    ]


def test_s6_a_fixed_a_is_no_parameter(llama):
    model = adapted(llama, **FIXED)
    names = {name.rpartition("default.")[2] for name, _ in model.named_parameters() if "hora_hyper" in name}
    assert names == {"b.q", "b.v"}
    stored = peft.get_peft_model_state_dict(model)
    assert {name.rpartition("hora_hyper.")[2] for name in stored} == {"a.q", "a.v", "b.q", "b.v"}


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: model.requires_grad_(True)], ids=["", "all"])
def test_s6_a_fixed_a_stays_whatever_trains(llama, wrap):
    model = wrap(adapted(llama, **FIXED))
    before = [hypernet.params()["a.q"].clone() for hypernet in hypernets(model)]
    optimiser = train(model, llama.inputs(), weight_decay=0.5)
    assert all(torch.equal(a, hypernet.params()["a.q"]) for a, hypernet in zip(before, hypernets(model), strict=True))
    assert any(hypernet.params()["b.q"].any() for hypernet in hypernets(model))
    adapters = [state for p, state in optimiser.state.items() if p.shape == (4, 8, 3)]
    assert adapters


def test_s6_a_fixed_a_costs_no_optimiser_state_and_less_backward_work(llama):
    """A LoRA of the same rank has the A as well."""
    numbers = {}
    for name, fields in (("fixed", FIXED), ("lora", FIXED | {"a_source": "direct"})):
        model = adapted(llama, **fields)
        optimiser = train(model, llama.inputs(), steps=1)
        state = sum(v.numel() * v.element_size() for s in optimiser.state.values() for v in s.values() if v.ndim)
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            model(**llama.inputs(), labels=llama.inputs()["input_ids"]).loss.backward()
        numbers[name] = state, counter.get_total_flops()
    rank, embed, rows, tokens, layers = 3, 32, 32 + 16, 14, 2
    assert numbers["lora"][0] - numbers["fixed"][0] == layers * 2 * (2 * rank * embed) * 4
    products = layers * 2 * (2 * rank * embed * tokens)
    products += 2 * rank * rows * tokens  # of the first layer, whose input is frozen as well
    assert numbers["lora"][1] - numbers["fixed"][1] == products


def test_a_fixed_a_is_saved_and_loaded(llama, tmp_path):
    model = adapted(llama, **FIXED)
    for hypernet in hypernets(model):
        for key, value in hypernet.params().items():
            value.data.normal_() if is_trained(hypernet.spec, key) else value.normal_()
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama.model(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(**llama.inputs()).logits, model(**llama.inputs()).logits, rtol=0, atol=0)
    assert not [name for name, _ in again.named_parameters() if ".a." in name and "hora_hyper" in name]
    resumed = peft.PeftModel.from_pretrained(llama.model(), tmp_path, is_trainable=True)
    train(resumed, llama.inputs())
    for one, other in zip(hypernets(model), hypernets(resumed), strict=True):
        assert torch.equal(one.params()["a.v"], other.params()["a.v"])
        assert not torch.equal(one.params()["b.v"], other.params()["b.v"])


@pytest.mark.parametrize("fields", [PRESETS[name].fields for name in PRESETS], ids=list(PRESETS))
def test_every_setting_trains_merges_freezes_and_travels(llama, fields, tmp_path):
    model = adapted(llama, r=3, init_weights=False, **fields)
    train(model, llama.inputs())
    model.eval()
    with torch.no_grad():
        expected = model(**llama.inputs()).logits
        model.save_pretrained(tmp_path / "adapter")
        loaded = peft.PeftModel.from_pretrained(llama.model(), tmp_path / "adapter")
        torch.testing.assert_close(loaded(**llama.inputs()).logits, expected, rtol=0, atol=0)
        hora_torch.export_lora(model, tmp_path / "lora")
        lora = peft.PeftModel.from_pretrained(llama.model(), tmp_path / "lora")
        torch.testing.assert_close(lora(**llama.inputs()).logits, expected, rtol=1e-4, atol=1e-5)
        hora_torch.freeze(loaded)
        torch.testing.assert_close(loaded(**llama.inputs()).logits, expected, rtol=1e-5, atol=1e-6)
        merged = model.merge_and_unload()(**llama.inputs()).logits
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_s2_sharing_a_alone_is_lora_exactly(llama):
    """PEFT's own LoRA from the same start takes the same steps."""
    ours = adapted(llama, r=4, hora_alpha=8, sharing="a")
    theirs = peft.get_peft_model(llama.model(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for layer, hypernet in enumerate(hypernets(ours)):
            for p in "qv":
                prefix = f"base_model.model.model.layers.{layer}.self_attn.{p}_proj.lora_"
                parameters[f"{prefix}A.default.weight"].copy_(hypernet.params()[f"a.{p}"])
                assert not parameters[f"{prefix}B.default.weight"].any()
    for model in (ours, theirs):
        train(model, llama.inputs(), steps=5)
    for layer, hypernet in enumerate(hypernets(ours)):
        for p in "qv":
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{p}_proj.lora_"
            a, b = hypernet.params()[f"a.{p}"], hypernet.params()[f"b.{p}"].flatten(0, 1)
            torch.testing.assert_close(a, parameters[f"{prefix}A.default.weight"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(b, parameters[f"{prefix}B.default.weight"], rtol=1e-4, atol=1e-5)


def test_s8_widths_that_differ_are_refused_before_anything_changes():
    model = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(8, 2, vdim=6, batch_first=True)})
    with pytest.raises(HoraError, match=r"spec S8"):
        peft.get_peft_model(model, HoraConfig(r=2, tie_a=True, target_modules=["attn"]))
    assert not any(isinstance(module, HoraLayer) for module in model.modules())


def test_g8_gates_learn(llama):
    model = adapted(llama, r=3, residual=True, gate=0.5, init_weights=False)
    train(model, llama.inputs())
    gates = torch.cat([hypernet.params()[f"gate.{p}"] for hypernet in hypernets(model) for p in "qv"])
    assert (gates != 0.5).all()


def test_g8_the_report_says_how_much_is_shared(llama):
    model = adapted(llama, r=3, residual=True, gate=0.5)
    assert "q open, v open" in hora_torch.report(model)
    with torch.no_grad():
        for hypernet in hypernets(model):
            hypernet.params()["b_out.q"].normal_()
            hypernet.params()["b.v"].normal_()
    assert "q 100%, v 0%" in hora_torch.report(model)


@pytest.mark.parametrize(("sharing", "share"), [("full", "all"), ("b", "all"), ("a", "none"), ("none", "none")])
def test_without_a_free_part_the_report_says_that_all_of_b_is_shared_or_none(llama, sharing, share):
    (row,) = [line for line in hora_torch.report(adapted(llama, sharing=sharing)).splitlines() if "self_attn" in line]
    assert row.split()[-2] == share


def test_g8_decay_of_the_free_part_alone_pulls_towards_sharing(llama):
    model = adapted(llama, r=3, residual=True, gate=0.5, init_weights=False)
    groups = hora_torch.param_groups(model, 1e-2, residual_decay=0.3)
    assert {group["name"]: group["weight_decay"] for group in groups} == {
        "A": 0.0,
        "B": 0.0,
        "B, no decay": 0.0,
        "B, residual": 0.3,
    }
    names = {param: name for name, param in model.named_parameters()}
    (residual,) = (group["params"] for group in groups if group["name"] == "B, residual")
    assert {names[param].rpartition("default.")[2] for param in residual} == {"b.q", "b.v"}


def test_the_report_names_a_layer_alone_and_counts_those_that_are_alike(llama):
    model = adapted(llama, r=2, rank_pattern={"layers.1.self_attn.[qv]_proj": 3})
    lines = hora_torch.report(model).splitlines()[2:]
    assert [line.split("  ")[0] for line in lines] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    (line,) = hora_torch.report(adapted(llama, r=2)).splitlines()[2:]
    assert line.startswith("model.layers.0.self_attn and 1 more  ")


def test_g8_what_values_that_are_elsewhere_generate_is_not_known(llama):
    (line,) = hora_torch.report(adapted(llama, residual=True).to("meta")).splitlines()[2:]
    assert " elsewhere " in line
