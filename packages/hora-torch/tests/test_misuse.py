"""What people do that used to give wrong numbers without a word."""

import copy

import hora_torch
import numpy as np
import peft
import pytest
import torch
from hora_spec import HoraError
from hora_torch import HoraConfig
from hora_torch.layer import HoraLayer
from torch import nn

from .oracle import adapted, agree, config, current, differ, evaluate, parameters, truth
from .test_planning import Attention, Config


@pytest.fixture
def family(families):
    return families["llama"]


def scale(model, factor=1.3):
    for param in parameters(model).values():
        param.data *= factor


def test_values_are_not_loaded_into_a_merged_adapter(family, tmp_path):
    adapted(family, seed=5).save_pretrained(tmp_path)
    model = adapted(family)
    model.merge_adapter()
    with pytest.raises(HoraError, match="unmerge first"):
        model.load_adapter(tmp_path, "default")


def test_unmerging_does_not_undo_what_another_wrote(family):
    model = adapted(family)
    model.merge_adapter()
    layer = next(module for module in model.modules() if isinstance(module, HoraLayer))
    with torch.no_grad():
        layer.base_layer.weight[0, 0] += 1
    written = layer.base_layer.weight.clone()
    with pytest.raises(HoraError, match="opposite order"):
        model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, written)
    with torch.no_grad():
        layer.base_layer.weight[0, 0] -= 1


def test_a_generator_that_is_closed_early_still_says_what_was_changed(family):
    model = adapted(family)

    def stream():
        with hora_torch.cached_factors(model):
            while True:
                yield evaluate(model, family.inputs())

    outputs = stream()
    next(outputs)
    scale(model)
    with pytest.raises(HoraError, match="inside cached_factors"):
        outputs.close()


def test_a_scope_of_generation_is_that_of_its_model(family):
    """Another model is trained and evaluated in between, as by a reward."""
    model, other = adapted(family), adapted(family, seed=3)
    seen = []

    def between(ids, scores):
        scale(other)
        seen.append((evaluate(other, family.inputs()), truth(family, current(other))))
        return scores

    model.generate(**family.inputs(), max_new_tokens=3, min_new_tokens=3, do_sample=False, logits_processor=[between])
    assert len(seen) == 3
    differ(seen[0][1], seen[1][1])
    for actual, expected in seen:
        agree(actual, expected)


def test_freezing_one_adapter_leaves_others_that_were_made_with_the_same_config(family, tmp_path):
    shared = config()
    model = peft.get_peft_model(family.model(), shared).eval()
    model.add_adapter("other", shared)
    expected = evaluate(model, family.inputs())
    hora_torch.freeze(model, "other")
    model.save_pretrained(tmp_path)
    agree(evaluate(peft.PeftModel.from_pretrained(family.model(), tmp_path), family.inputs()), expected)


def test_a_frozen_adapter_is_not_trained_after_switching(family):
    model = adapted(family)
    hora_torch.freeze(model)
    model.set_adapter("default")
    assert not [name for name, param in model.named_parameters() if param.requires_grad]


def test_a_config_of_a_saved_adapter_starts_anew_with_a_warning(family, tmp_path):
    adapted(family).save_pretrained(tmp_path)
    model = peft.get_peft_model(family.model(), HoraConfig.from_pretrained(tmp_path))
    with pytest.warns(UserWarning, match="no values were loaded"):
        evaluate(model, family.inputs())


def test_a_loaded_adapter_compiles_as_one_graph(family, tmp_path):
    adapted(family).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(family.model(), tmp_path).eval()
    expected = evaluate(copy.deepcopy(model), family.inputs())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    agree(evaluate(compiled, family.inputs()), expected)


class Block(nn.Module):
    """A layer that models stand in several places, as ALBERT's."""

    def __init__(self):
        super().__init__()
        self.attn = Attention(num_heads=4, num_key_value_heads=2, head_dim=8)

    def forward(self, x):
        return x + self.attn(x)


def test_a_block_that_stands_in_several_places_is_merged():
    block, x = Block(), torch.randn(1, 5, 32)
    model = peft.get_peft_model(nn.Sequential(block, block, block), config(alpha_pattern={})).eval()
    with torch.no_grad():
        expected = model(x)
        model.merge_adapter()
        agree(model(x), expected)
        model.unmerge_adapter()
        assert torch.equal(model(x), expected)


class Measured(Attention):
    """Mentions the weight of a projection that it calls."""

    def penalty(self):
        return self.q_proj.weight.norm()


def test_a_weight_that_is_mentioned_beside_the_call_is_no_bypass():
    model = nn.Sequential(Measured(num_heads=4, num_key_value_heads=2, head_dim=8))
    assert len(hora_torch.plan(model, HoraConfig(r=2)).layers[0].sites) == 2


PLANS = {
    "the order of a known class": (
        lambda: nn.Sequential(pytest.importorskip("timm").layers.Attention(32, num_heads=4)),
        {"target_modules": ["qkv"], "row_order": {"qkv": "k v"}, "fused_projections": ("k", "v")},
        "classes that are not known",
    ),
    "an order of no target": (
        lambda: nn.Sequential(Attention(head_dim=8)),
        {"row_order": {"to_qvk": "q k v"}},
        "row_order speaks of targets",
    ),
    "heads of no target": (
        lambda: nn.Sequential(Attention(head_dim=8)),
        {"num_heads": {"q_prj": 4}},
        "num_heads speaks of targets",
    ),
    "grouped queries that nothing tells of": (
        lambda: nn.Sequential(Attention(fused=True)),
        {"row_order": {"to_qkv": "q k v"}, "num_heads": 4},
        "num_kv_heads",
    ),
    "values as many as keys": (
        lambda: nn.Sequential(Unequal(num_heads=8, head_dim=24)),
        {},
        "heads of k_proj=8",
    ),
}


class Unequal(nn.Module):
    """Values of another width than keys, as in latent attention."""

    def __init__(self, **says):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(32, 192), nn.Linear(32, 192), nn.Linear(32, 96)
        for name, value in says.items():
            setattr(self, name, value)


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_that_nothing_confirms_is_refused(case):
    build, kwargs, message = PLANS[case]
    with pytest.raises(HoraError, match=message):
        hora_torch.plan(build(), HoraConfig(**({"r": 2, "target_modules": None} | kwargs))) if kwargs else (
            hora_torch.plan(build(), HoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        )


def test_a_model_does_not_speak_for_attention_that_says_nothing():
    model = nn.Sequential(Attention())
    model.config = Config(num_attention_heads=8, num_key_value_heads=8)
    with pytest.raises(HoraError, match=r"model\.config\.num_"):
        hora_torch.plan(model, HoraConfig(r=2))
    numbers = Attention(num_heads=np.int64(4), num_key_value_heads=np.int64(2))
    layer = hora_torch.plan(nn.Sequential(numbers), HoraConfig(r=2)).layers[0]
    assert {p: site.projection.num_heads for p, site in layer.sites.items()} == {"q": 4, "v": 2}


def test_an_instance_with_a_forward_of_its_own_is_not_its_class():
    attention = pytest.importorskip("timm").layers.Attention(32, num_heads=4)
    attention.forward = lambda x: x
    with pytest.raises(HoraError, match="is not known"):
        hora_torch.plan(nn.Sequential(attention), HoraConfig(r=2, target_modules=["qkv"]))


def test_verify_finds_values_that_are_split_wrongly(family):
    from .test_verify import of_heads, with_sites

    for factor in (2, 0.5):
        change = of_heads(factor)
        model = with_sites(adapted(family), lambda p, site, change=change: change(p, site) if p == "v" else site)
        assert not [f for f in hora_torch.verify(model, family.inputs()).of("ok") if "rows" in f.question]


def test_verify_does_not_judge_what_is_no_query_key_or_value(family):
    model = adapted(family, target_modules=["q_proj", "o_proj", "gate_proj"], num_heads={"o_proj": 1, "gate_proj": 1})
    assert hora_torch.verify(model, family.inputs()).ok
    with torch.inference_mode(), pytest.raises(HoraError, match="inference_mode"):
        hora_torch.verify(model, family.inputs())
    with model.disable_adapter(), pytest.raises(HoraError, match="enabled"):
        hora_torch.verify(model, family.inputs())
    with torch.no_grad():
        assert hora_torch.verify(model, family.inputs()).ok
