"""How ``verify`` tries a model, on models so small that its answers can be told by hand."""

from types import SimpleNamespace

import hora_torch
import peft
import pytest
import torch
from hora_spec import AdapterSpec, HoraError, LayerShape
from hora_torch.hypernet import HoraHypernet
from hora_torch.layer import HoraLayer
from hora_torch.quantized import Rounding
from hora_torch.stored import PlainWeight
from hora_torch.verification import _stir
from torch import nn

from .test_verify import Bypass, Drawing, of_heads, small, verdicts, with_sites

ROWS, MERGED = "adapts the rows of its heads", "computes the same merged"


class Attention(Drawing):
    """Without a draw."""

    def draw(self, x):
        return 0 * x


def adapted(base, **kwargs):
    return peft.get_peft_model(nn.Sequential(base), small(**kwargs))


def batch(*shape):
    return torch.randn(*(shape or (1, 5, 8)), generator=torch.Generator().manual_seed(0))


def about(report, question):
    return {
        finding.place: (finding.verdict, finding.detail) for finding in report.findings if finding.question == question
    }


def hypernets(model):
    return [module for module in model.modules() if isinstance(module, HoraHypernet)]


def test_all_is_asked_and_right():
    report = hora_torch.verify(adapted(Attention()), batch())
    assert {finding.verdict for finding in report.findings} == {"ok"}, str(report)
    assert [*dict.fromkeys(finding.question for finding in report.findings)] == [
        "receives a gradient",
        ROWS,
        MERGED,
        "is restored by unmerging",
        "has a weight of its own",
    ]


class Two(Attention):
    def forward(self, x, other, *, scale=1.0):
        return super().forward(scale * x + other)


def test_a_batch_is_a_tensor_positions_or_names():
    model = peft.get_peft_model(Two(), small())
    x, other = batch(), batch(1, 5, 8)
    for given in ((x, other), {"x": x, "other": other, "scale": 2.0}):
        assert hora_torch.verify(model, given).ok
    assert hora_torch.verify(adapted(Attention()), x).ok


class Text(Attention):
    def forward(self, x):
        super().forward(x)
        return {"text": "no number", "ids": torch.ones(3, dtype=torch.long)}


def test_a_model_without_a_floating_output_is_refused():
    with pytest.raises(HoraError, match="needs a model with a floating output, got dict"):
        hora_torch.verify(adapted(Text()), batch())


def test_what_cannot_be_tried_is_refused():
    model = adapted(Attention())
    with torch.inference_mode(), pytest.raises(HoraError, match="outside inference_mode"):
        hora_torch.verify(model, batch())
    with model.disable_adapter(), pytest.raises(HoraError, match="adapters that are enabled"):
        hora_torch.verify(model, batch())
    with pytest.raises(HoraError, match="got 0 layers"):
        hora_torch.verify(nn.Sequential(Attention()), batch())
    next(layer for layer in model.modules() if isinstance(layer, HoraLayer)).merge()
    with pytest.raises(HoraError, match="unmerge first"):
        hora_torch.verify(model, batch())
    model.add_module("away", nn.Linear(2, 2, device="meta"))
    with pytest.raises(HoraError, match="call it before offloading"):
        hora_torch.verify(model, batch())


class Caching(Attention):
    """Returns its keys where it is told to keep them, as a cache does."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.part = nn.Identity()
        self.part.config = config
        self.told = []

    def forward(self, x):
        self.told.append((self.config.use_cache, self.training))
        return (super().forward(x), self.k_proj(x)) if self.config.use_cache else super().forward(x)


@pytest.mark.parametrize("use_cache", [True, False, None])
@pytest.mark.parametrize("fails", [True, False])
def test_a_model_is_tried_in_evaluation_without_a_cache_and_left_as_it_was(use_cache, fails):
    base = Caching(SimpleNamespace(use_cache=use_cache))
    model = adapted(base, target_modules=["q_proj", "k_proj", "v_proj"]).train()
    base.part.eval()
    frozen = hypernets(model)[0].b_in.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    if fails:
        with pytest.raises(RuntimeError):
            hora_torch.verify(model, batch(1, 5, 7))
    else:
        assert hora_torch.verify(model, batch()).ok
    assert {*base.told} == {(False, False)}
    assert base.config.use_cache is use_cache
    assert base.training
    assert not base.part.training
    assert not frozen.requires_grad
    assert {name for name, param in model.named_parameters() if param.requires_grad} == trained
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_adapter_that_is_not_trained_is_verified_all_the_same():
    model = adapted(Attention())
    for param in model.parameters():
        param.requires_grad_(False)
    report = hora_torch.verify(model, batch())
    assert {finding.verdict for finding in report.findings} == {"ok"}, str(report)
    assert not any(param.requires_grad for param in model.parameters())


def test_what_a_model_draws_is_told_by_no_generator_of_others():
    drawn = []

    class Kept(Drawing):
        def draw(self, x):
            drawn.append(torch.rand(1).item())
            return 0 * x

    for seed in (1, 2):
        torch.manual_seed(seed)
        hora_torch.verify(adapted(Kept()), batch())
    assert len(drawn) > 10
    assert len({*drawn}) == 1


class Partial(nn.Module):
    """Of three attentions one counts."""

    def __init__(self):
        super().__init__()
        self.used, self.idle, self.uncalled = Attention(), Attention(), Attention()

    def forward(self, x):
        self.idle(x)
        return self.used(x)


def test_of_layers_that_receive_no_gradient_it_is_said_why():
    model = peft.get_peft_model(Partial(), small())
    found = about(hora_torch.verify(model, batch()), "receives a gradient")
    assert {
        place.split(".")[-2]: (verdict, detail.partition(" ")[0]) for place, (verdict, detail) in found.items()
    } == {
        "used": ("ok", ""),
        "idle": ("unknown", "none"),
        "uncalled": ("unknown", "this"),
    }
    rows = about(hora_torch.verify(model, batch()), ROWS)
    assert {place.rpartition(".")[2]: verdict for place, (verdict, _) in rows.items()} == {"used": "ok", "idle": "ok"}


def test_an_output_that_adapters_do_not_change_is_wrong_where_their_layers_have_part_in_it(monkeypatch):
    model = adapted(Attention())
    for layer in model.modules():
        if isinstance(layer, HoraLayer):
            monkeypatch.setattr(layer, "forward", layer.get_base_layer().forward)
    found = about(hora_torch.verify(model, batch()), MERGED)
    assert found == {"the model": ("wrong", "the adapters change no output")}
    base = Partial()
    base.used = nn.Identity()
    verdict, detail = about(hora_torch.verify(peft.get_peft_model(base, small()), batch()), MERGED)["the model"]
    assert verdict == "unknown"
    assert "takes part" in detail


def test_a_new_adapter_is_tried_with_values_that_are_not_zero():
    model = peft.get_peft_model(nn.Sequential(Attention()), hora_torch.HoraConfig(r=2))
    report = hora_torch.verify(model, batch())
    assert {finding.verdict for finding in report.findings} == {"ok"}, str(report)


def test_what_is_no_query_key_or_value_is_right_by_its_one_head_alone():
    class WithOutput(Attention):
        def __init__(self):
            super().__init__()
            self.o_proj = nn.Linear(8, 8)

        def forward(self, x):
            return self.o_proj(super().forward(x))

    model = adapted(WithOutput(), target_modules=["q_proj", "v_proj", "o_proj"], num_heads={"o_proj": 1})
    found = about(hora_torch.verify(model, batch()), ROWS)
    by_head = [(place, verdict) for place, (verdict, detail) in found.items() if detail == "by its one head"]
    assert by_head == [("base_model.model.0.o_proj", "ok")]
    assert found["base_model.model.0"] == ("ok", "")
    alone = with_sites(adapted(WithOutput(), target_modules=["q_proj", "v_proj"]), of_heads(0.5))
    assert "one head looks like several" in about(hora_torch.verify(alone, batch()), ROWS)["base_model.model.0"][1]


def test_heads_of_a_multihead_attention_are_right_by_its_shape():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    report = hora_torch.verify(peft.get_peft_model(Encoder(), small(target_modules=["attention"])), batch())
    assert {*about(report, ROWS).values()} == {("ok", "by the shape of nn.MultiheadAttention")}


class Normed(Attention):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(-2, -3) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        q = self.norm(q) if self.norm.normalized_shape == (4,) else self.norm(q.transpose(-2, -3).flatten(-2))
        q = q if q.ndim == k.ndim else q.unflatten(-1, (2, 4)).transpose(-2, -3)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)


class SwapNorm(nn.RMSNorm):
    """A norm of each head that swaps heads."""

    def forward(self, x):
        return super().forward(x).flip(-3)


def test_norms_are_looked_at_first_and_looked_past_where_they_hide_rows():
    for norm, verdict in ((nn.LayerNorm(8), "ok"), (nn.RMSNorm(4), "ok"), (SwapNorm(4), "wrong")):
        report = hora_torch.verify(adapted(Normed(norm)), batch())
        assert {found for found, _ in about(report, ROWS).values()} == {verdict}, (norm, str(report))


class Steep(Attention):
    """Answers with what rounding changes."""

    def forward(self, x):
        return (1e6 * super().forward(x)).sin()


def test_a_model_that_amplifies_rounding_is_measured_by_rounding():
    found = about(hora_torch.verify(adapted(Steep()), batch()), MERGED)
    assert found["the model"][0] == "unknown"
    assert "so much does rounding alone" in found["the model"][1]


def test_what_codes_lose_is_said(monkeypatch):
    write = PlainWeight.write
    less = lambda stored, value: write(stored, stored.bits() + (value - stored.bits()) * 0.9)  # noqa: E731
    monkeypatch.setattr(PlainWeight, "write", less)
    model = adapted(Attention())
    assert about(hora_torch.verify(model, batch()), MERGED)["the model"][0] == "wrong"
    lost = property(lambda layer: {"weight": Rounding(0.0, 0.25), "other": Rounding(0.0, 0.1)})
    monkeypatch.setattr(HoraLayer, "rounding", lost)
    verdict, detail = about(hora_torch.verify(model, batch()), MERGED)["the model"]
    assert verdict == "unknown"
    assert "loses up to 25% of the update" in detail


def test_a_weight_that_is_passed_by_or_shared_is_named():
    model = adapted(Bypass())
    report = hora_torch.verify(model, batch())
    assert (MERGED, "the model") in verdicts(report, "wrong"), str(report)
    assert about(report, "has a weight of its own")["base_model.model.0.q_proj"] == ("ok", "")
    base = nn.Sequential(Attention(), Attention())
    base[1].v_proj.weight = base[0].v_proj.weight
    report = hora_torch.verify(peft.get_peft_model(base, small(target_modules=["v_proj"])), batch())
    own = about(report, "has a weight of its own")
    assert [*own.values()] == [("unknown", detail) for _, detail in own.values()]
    assert all("0.v_proj" in detail and "1.v_proj" in detail for _, detail in own.values())
    assert about(report, MERGED)["the model"][0] == "unknown"


SPECS = {
    "plain": AdapterSpec(2),
    "scaled": AdapterSpec(2, alpha=0.02),
    "residual": AdapterSpec(2, alpha=20, residual=True),
    "lora": AdapterSpec(2, sharing="none"),
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("trained", [True, False])
def test_an_update_is_stirred_to_a_tenth_of_a_usual_weight(spec, trained):
    """Which has variance 1 / embed; what generates it, and what has values, keep them up to a factor."""
    hypernet = HoraHypernet(SPECS[spec], LayerShape.attention(12, 3), name="x")
    if trained:
        hypernet.randomize()
    before = {key: param.detach().clone() for key, param in hypernet.params().items()}
    state = torch.get_rng_state()
    _stir(hypernet)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in hypernet().values():
        update = (hypernet.spec.scaling * (b @ a)).square().mean().sqrt()
        torch.testing.assert_close(update, torch.tensor(0.1 / 12**0.5))
    for key, param in hypernet.params().items():
        if not key.startswith(("b.", "b_out.")):
            assert torch.equal(param, before[key])
        elif trained:
            ratio = param / before[key]
            torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


def test_an_adapter_without_an_update_of_any_size_is_left_alone():
    hypernet = HoraHypernet(AdapterSpec(2), LayerShape.attention(12, 3), name="x")
    for param in hypernet.parameters():
        param.data.zero_()
    hypernet.params()["b_in"].data[0, 0] = 1.0
    _stir(hypernet)
    assert all(bool(torch.isfinite(param).all()) for param in hypernet.parameters())
