"""``verify`` passes what is right, names what is wrong, and leaves the model as it was."""

import dataclasses
import itertools

import hora_torch
import peft
import pytest
import torch
from hora_spec import HoraError, Layout, ProjectionShape, Window
from hora_torch.findings import Finding, Report
from hora_torch.layer import HoraLayer
from hora_torch.stored import PlainWeight
from torch import nn

from .oracle import adapted, assert_unchanged, snapshot


def verdicts(report, verdict):
    return {(finding.question, finding.place) for finding in report.of(verdict)}


def test_every_family_is_found_right_and_left_as_it_was(family):
    model = adapted(family)
    before = snapshot(model)
    report = hora_torch.verify(model, family.inputs())
    assert_unchanged(model, before)
    assert report.ok, str(report)
    assert not [finding for finding in report.of("unknown") if "rows" in finding.question], str(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_verified(families, dtype):
    family = families["llama"]
    model = peft.get_peft_model(family.model().to(dtype), small())
    report = hora_torch.verify(model, family.inputs())
    assert {finding.verdict for finding in report.findings} == {"ok"}, str(report)
    report = hora_torch.verify(with_sites(model, of_heads(2)), family.inputs())
    assert {question for question, _ in verdicts(report, "wrong")} == {"adapts the rows of its heads"}, str(report)


def test_a_new_adapter_is_verified_before_its_first_step(families):
    family = families["llama"]
    model = peft.get_peft_model(family.model(), hora_torch.HoraConfig(r=2)).train()
    before = snapshot(model)
    assert hora_torch.verify(model, family.inputs()).ok
    assert_unchanged(model, before)


def with_sites(model, change):
    """The same model with other places for its projections, as a wrong plan would have them."""
    for layer in model.modules():
        if isinstance(layer, HoraLayer):
            attached = layer.hora_attached["default"]
            sites = {p: change(p, site) for p, site in attached.sites.items()}
            layer.hora_attached["default"] = dataclasses.replace(attached, sites=sites)
    return model


def shifted(by):
    def change(p, site):
        window = site.layout.window
        layout = Layout(site.layout.pattern, Window(window.axis, window.start + by[p], window.stop + by[p]))
        return dataclasses.replace(site, layout=layout)

    return change


def of_heads(factor):
    def change(p, site):
        shape = site.projection
        shape = ProjectionShape(int(shape.num_heads * factor), int(shape.head_dim / factor), shape.embed_dim)
        return dataclasses.replace(site, projection=shape)

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("timm-vit", shifted({"q": 0, "v": -32})),  # k's rows taken for v's
        ("timm-vit", shifted({"q": 32, "v": -64})),
        ("timm-vit", shifted({"q": 4, "v": 0})),  # half a head off
        ("gpt2", shifted({"q": 0, "v": -32})),
        ("phi3", shifted({"q": 16, "v": -16})),
        ("llama", of_heads(2)),
        ("llama", of_heads(0.5)),
        ("timm-vit", of_heads(2)),
        ("bert", of_heads(0.5)),
    ],
)
def test_wrong_rows_and_heads_are_named(families, name, change):
    model = with_sites(adapted(families[name]), change)
    report = hora_torch.verify(model, families[name].inputs())
    assert {question for question, _ in verdicts(report, "wrong")} == {"adapts the rows of its heads"}, str(report)
    with pytest.raises(HoraError, match="planned head"):
        report.require()


class Bypass(nn.Module):
    """An attention that computes with one weight past its module, in code that a plan cannot read."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 2, 4
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        weight = getattr(self.q_proj, "weight")  # noqa: B009 - as code does that a plan cannot see through
        q, k, v = nn.functional.linear(x, weight), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(-2, -3) for y in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)


def small(**kwargs):
    return hora_torch.HoraConfig(r=2, hidden_dim=4, head_embed_dim=3, init_weights=False, **kwargs)


def test_a_module_that_is_passed_by_is_named():
    model = peft.get_peft_model(nn.Sequential(Bypass()), small())
    report = hora_torch.verify(model, torch.randn(1, 5, 8))
    assert ("computes the same merged", "the model") in verdicts(report, "wrong"), str(report)
    assert "does not call" in str(report)


def test_weights_that_are_tied_are_named():
    base = nn.Sequential(Bypass(), Bypass())
    base[1].v_proj.weight = base[0].v_proj.weight
    model = peft.get_peft_model(base, small(target_modules=["v_proj"]))
    report = hora_torch.verify(model, torch.randn(1, 5, 8))
    assert len([finding for finding in report.of("unknown") if "own" in finding.question]) == 2


def test_merging_that_loses_the_update_is_wrong(families, monkeypatch):
    monkeypatch.setattr(PlainWeight, "write", lambda stored, value: None)
    report = hora_torch.verify(adapted(families["llama"]), families["llama"].inputs())
    assert ("computes the same merged", "the model") in verdicts(report, "wrong")


def test_a_base_that_changes_in_unmerging_is_wrong(families, monkeypatch):
    write = PlainWeight.write
    monkeypatch.setattr(PlainWeight, "write", lambda stored, value: write(stored, value + 1e-6))
    report = hora_torch.verify(adapted(families["llama"]), families["llama"].inputs())
    assert ("is restored by unmerging", "the model") in verdicts(report, "wrong")


class Drawing(Bypass):
    """An attention whose input is a draw, also in evaluation, as in ViT-MAE and ViLT."""

    def draw(self, x):
        return torch.randn_like(x)

    def forward(self, x):
        x = x + self.draw(x)
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(-2, -3) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)


class Counting(Drawing):
    """Differs at each call, whatever is seeded."""

    calls = 0

    def draw(self, x):
        self.calls += 1
        return x * self.calls


def test_a_model_that_draws_draws_the_same_and_the_generator_of_others_is_left_alone():
    model = peft.get_peft_model(nn.Sequential(Drawing()), small())
    state = torch.get_rng_state()
    report = hora_torch.verify(model, torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert report.ok, str(report)
    assert not report.of("unknown"), str(report)


def test_a_model_that_differs_from_one_seed_is_named():
    model = peft.get_peft_model(nn.Sequential(Counting()), small())
    report = hora_torch.verify(model, torch.randn(1, 5, 8))
    assert ("computes the same merged", "the model") in verdicts(report, "unknown"), str(report)
    assert "from one seed" in str(report)


class Twice(nn.Module):
    """Two attentions, of which the output is that of the first."""

    def __init__(self):
        super().__init__()
        self.used, self.idle, self.uncalled = Drawing(), Drawing(), Drawing()

    def forward(self, x):
        self.idle(x)
        return self.used(x)


def test_layers_that_take_no_part_are_named_and_no_alarm():
    model = peft.get_peft_model(Twice(), small())
    report = hora_torch.verify(model, torch.randn(1, 5, 8))
    unknown = {place for question, place in verdicts(report, "unknown") if question == "receives a gradient"}
    assert {place.split(".")[-2] for place in unknown} == {"idle", "uncalled"}
    assert report.ok
    assert "this batch does not call it" in str(report)
    assert "none reaches a.q" in str(report)


def test_a_model_whose_output_no_layer_takes_part_in_is_unknown():
    base = Twice()
    base.used = nn.Identity()
    report = hora_torch.verify(peft.get_peft_model(base, small()), torch.randn(1, 5, 8))
    assert report.ok, str(report)
    assert ("computes the same merged", "the model") in verdicts(report, "unknown")


def test_adapters_without_effect_on_an_output_that_their_layers_have_part_in_are_wrong(monkeypatch):
    model = peft.get_peft_model(nn.Sequential(Drawing()), small())
    for layer in model.modules():
        if isinstance(layer, HoraLayer):
            monkeypatch.setattr(layer, "forward", layer.get_base_layer().forward)
    report = hora_torch.verify(model, torch.randn(1, 5, 8))
    wrong = verdicts(report, "wrong")
    assert {question for question, _ in wrong} == {"receives a gradient", "computes the same merged"}, str(report)
    assert len(wrong) == 3
    assert "change no output" in str(report)


def test_an_effect_of_no_more_than_rounding_is_not_compared():
    class Faint(Drawing):
        def forward(self, x):
            return 1e-7 * super().forward(x) + x

    report = hora_torch.verify(peft.get_peft_model(nn.Sequential(Faint()), small()), torch.randn(1, 5, 8))
    assert ("computes the same merged", "the model") in verdicts(report, "unknown"), str(report)
    assert "rounding" in str(report)


def test_a_merge_that_is_off_by_little_is_wrong(families, monkeypatch):
    write = PlainWeight.write
    less = lambda stored, value: write(stored, stored.bits() + (value - stored.bits()) * 0.99)  # noqa: E731
    monkeypatch.setattr(PlainWeight, "write", less)
    report = hora_torch.verify(adapted(families["llama"]), families["llama"].inputs())
    assert ("computes the same merged", "the model") in verdicts(report, "wrong"), str(report)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_that_packs_padded_batches_is_verified():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = peft.get_peft_model(nn.TransformerEncoder(layer, 2), small(target_modules=["self_attn"]))
    batch = {
        "src": torch.randn(2, 6, 16),
        "src_key_padding_mask": torch.tensor([[False] * 6, [False] * 4 + [True] * 2]),
    }
    assert hora_torch.verify(model, batch).ok


def test_a_report_says_what_is_wrong_first_and_equal_answers_once():
    findings = [
        Finding("fits", "a", "ok"),
        Finding("turns", "a", "unknown", "no key"),
        Finding("fits", "b", "wrong", "too wide"),
        Finding("fits", "c", "ok"),
        Finding("fits", "d", "ok"),
        Finding("turns", "d", "unknown", "no key"),
    ]
    expected = [
        "wrong   fits: b: too wide",
        "unknown turns: a and 1 more: no key",
        "ok      fits: a and 2 more",
    ]
    for order in itertools.permutations(range(len(findings)), len(findings)):
        report = Report(tuple(findings[i] for i in order))
        assert [line[:8] for line in str(report).splitlines()] == ["wrong   ", "unknown ", "ok      "]
    assert str(Report(tuple(findings))).splitlines() == expected
    with pytest.raises(HoraError, match="too wide"):
        report.require()


def test_what_cannot_be_verified_is_an_error(families):
    family = families["llama"]
    model = adapted(family)
    model.merge_adapter()
    with pytest.raises(HoraError, match="unmerge first"):
        hora_torch.verify(model, family.inputs())
    with pytest.raises(HoraError, match="active adapters"):
        hora_torch.verify(family.model(), family.inputs())


def test_an_exception_of_the_model_leaves_it_as_it_was(families):
    model = adapted(families["llama"]).train()
    before = snapshot(model)
    with pytest.raises(ValueError, match="input_ids"):
        hora_torch.verify(model, {"nothing": 1})
    assert_unchanged(model, before)
