"""What ``HoraModel`` does around its layers: beams, hooks, what a call needs, what is trained, what leaves again."""

import inspect
import warnings

import hora_torch
import peft
import pytest
import torch
from hora_spec import HoraError
from hora_torch import HoraConfig, HoraModel, model
from hora_torch.convolution import HoraConv
from hora_torch.layer import HoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .oracle import adapted, agree, config, differ, evaluate, snapshot
from .test_supported import Codes


@pytest.fixture
def family(families):
    return families["llama"]


def two(family, **kwargs):
    """A model with two adapters of different values, on different targets."""
    both = adapted(family, **kwargs)
    both.add_adapter("other", config(seed=3, target_modules=kwargs.get("target_modules"), r=3))
    return both


BEAMS = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
SCORED = {"output_scores": True, "return_dict_in_generate": True, "pad_token_id": 0}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_all_beams_of_a_sample_get_what_its_own_adapter_adds(families, name, beams):
    family = families[name]
    mixed, ids = two(family), family.inputs()["input_ids"]
    hooks = snapshot(mixed)["hooks"]
    asked = BEAMS | SCORED | {"num_beams": beams, "num_return_sequences": beams}

    def scores(ids, **kwargs):
        found = mixed.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **asked, **kwargs)
        return torch.stack(found.scores)[..., :64].nan_to_num(neginf=-99.0).transpose(0, 1).flatten(1)

    names = ["other", "default"]
    together = scores(ids, adapter_names=names).chunk(2)
    alone = []
    for sample, adapter in zip(ids.split(1), names, strict=True):
        mixed.set_adapter(adapter)
        alone.append(scores(sample))
    for one, other in zip(together, alone, strict=True):
        agree(one, other)
    differ(alone[0], scores(ids[:1]))
    assert snapshot(mixed)["hooks"] == hooks


def test_a_call_needs_the_hypernetworks_of_its_adapters_in_their_order(family):
    both = two(family, target_modules=["v_proj", "q_proj"])
    tuner = both.base_model
    of = {
        name: [
            module.hora_hyper[name]
            for module in both.modules()
            if isinstance(module, HoraLayer) and name in module.hora_hyper
        ]
        for name in ("default", "other")
    }
    assert len(of["default"]) == 2
    assert list(tuner._needed()) == of["default"]
    assert list(tuner._needed(["other", "default"])) == of["other"] + of["default"]
    assert list(tuner._needed(["nobody"])) == []
    both.peft_config["default"].hora_layers[0]["leader"] = "model.embed_tokens"
    both.peft_config["other"].hora_layers[0]["leader"] = "model.not.there"
    assert list(tuner._needed(["default", "other"])) == [of["default"][1], of["other"][1]]


def test_a_second_adapter_is_trained_once_it_is_active(family):
    both = two(family)
    trained = {name for name, param in both.named_parameters() if param.requires_grad}
    assert trained
    assert all(".default." in name for name in trained)


def test_codes_without_floats_leave_adapters_in_float32():
    base = nn.Sequential(
        nn.Linear(4, 4, dtype=torch.bfloat16),
        Codes(in_features=4, out_features=4),
        Codes(in_features=4, out_features=4),
    )
    base[2].weight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    for autocast, expected in ((True, torch.float32), (False, torch.bfloat16)):
        made = peft.get_peft_model(
            nn.Sequential(*base), HoraConfig(r=2, target_modules=["0", "1", "2"]), autocast_adapter_dtype=autocast
        )
        dtypes = [
            {param.dtype for param in layer.hora_hyper["default"].parameters()} for layer in made.base_model.model
        ]
        assert dtypes == [{expected}, {torch.float32}, {torch.float32}]
        made.unload()


def test_peft_s_own_check_before_a_merge_is_made(family, monkeypatch):
    asked = adapted(family)
    monkeypatch.setattr(HoraModel, "_check_merge_allowed", lambda self: (_ for _ in ()).throw(HoraError("not allowed")))
    with pytest.raises(HoraError, match="not allowed"):
        asked.merge_adapter()


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("merge_adapter", "safe_merge"),
        ("_unload_and_optionally_merge", "safe_merge"),
        ("inject_adapter", "low_cpu_mem_usage"),
    ],
)
def test_what_is_not_said_is_as_in_peft(name, argument):
    ours, theirs = (inspect.signature(getattr(cls, name)).parameters[argument] for cls in (HoraModel, BaseTuner))
    assert ours.default is theirs.default is False


def test_what_a_config_names_in_vain_is_said(family):
    with pytest.warns(UserWarning, match="target_modules names .*'v_prj'.*, which no module is called"):
        adapted(family, target_modules=["q_proj", "v_prj"])


def test_what_a_merge_loses_is_told_of_every_layer_that_lost_it(family, monkeypatch):
    both, told = two(family), []
    monkeypatch.setattr(HoraLayer, "merge_silently", lambda *_: True)
    monkeypatch.setattr(model, "warn_of_rounding", lambda rounded, stacklevel: told.extend(rounded))
    both.merge_adapter()
    assert told == [name for name, layer in both.base_model.model.named_modules() if isinstance(layer, HoraLayer)]


def test_what_was_trained_before_an_injection_that_fails_late_still_is(family, monkeypatch):
    base = family.model()
    base.lm_head.requires_grad_(False)
    before = {name: param.requires_grad for name, param in base.named_parameters()}

    def fail(self, model):
        BaseTuner._mark_only_adapters_as_trainable(self, model)
        raise RuntimeError("late")

    monkeypatch.setattr(HoraModel, "_mark_only_adapters_as_trainable", fail)
    with pytest.raises(RuntimeError, match="late"):
        peft.get_peft_model(base, config())
    assert {name: param.requires_grad for name, param in base.named_parameters()} == before
    assert len(set(before.values())) == 2


def test_a_config_that_describes_another_model_s_layers_is_refused():
    given = HoraConfig(r=2, target_modules=["0"])
    peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), given)
    with pytest.raises(HoraError, match="a config describes one adapter"):
        peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), given)


def test_of_the_warnings_of_an_unload_one_alone_is_left_out(family, monkeypatch):
    def unload(self, *args):
        warnings.warn("All adapters are already merged, nothing to do", stacklevel=1)
        warnings.warn("another", stacklevel=1)
        return self.model

    monkeypatch.setattr(BaseTuner, "_unload_and_optionally_merge", unload)
    tuner = adapted(family).base_model
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        tuner._unload_and_optionally_merge(merge=False)
    assert [str(one.message) for one in seen] == ["another"]


def test_an_unload_shows_no_progress_unless_asked(family, capsys):
    adapted(family).base_model.unload()
    adapted(family).base_model.merge_and_unload()
    adapted(family).base_model._unload_and_optionally_merge()
    assert capsys.readouterr().err == ""


def test_a_convolution_has_a_layer_of_its_own_kind():
    made = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1)), HoraConfig(r=2, target_modules=["0", "1"])
    )
    assert [type(layer) is HoraConv for layer in made.base_model.model] == [False, True]


ONE_MAP = {"qkv": "rows:1"}


class Bias(nn.Module):
    """As timm's BEiT, which adds the bias of q and v past its projection unless told otherwise."""

    def __init__(self, separate, bias):
        super().__init__()
        self.qkv = nn.Linear(4, 4)
        self.qkv_bias_separate, self.q_bias = separate, bias

    def forward(self, x):
        return self.qkv(x)


@pytest.mark.parametrize(("separate", "bias", "told"), [(False, True, True), (False, None, False), (True, True, False)])
def test_an_attention_is_told_to_call_its_projection_while_it_is_adapted(separate, bias, told):
    base = nn.Sequential(Bias(separate, bias), Bias(separate, bias), nn.Linear(4, 4))
    base[1].qkv_bias_separate = False
    made = peft.get_peft_model(base, HoraConfig(r=2, target_modules=["0.qkv", "2"], row_order=ONE_MAP))
    made.add_adapter("other", HoraConfig(r=2, target_modules=["0.qkv"], row_order=ONE_MAP))
    assert base[0].qkv_bias_separate is (separate or told)
    made.delete_adapter("other")
    with pytest.raises(HoraError):
        made.add_adapter("third", HoraConfig(r=2, target_modules=["0.qkv"]))
    assert base[0].qkv_bias_separate is (separate or told)
    assert made.unload()[0].qkv_bias_separate is separate
    assert "_hora_restores_qkv_bias" not in vars(base[0])
    assert base[1].qkv_bias_separate is False
    assert not hasattr(base[2], "qkv_bias_separate")


def test_what_could_not_be_injected_leaves_the_bias_where_it_was(monkeypatch):
    base = nn.Sequential(Bias(False, True))
    monkeypatch.setattr(model, "_keep_differentiable", lambda model: None)

    def fail(self, *args, **kwargs):
        raise KeyError("on the way")

    monkeypatch.setattr(HoraLayer, "set_requires_grad", fail)
    monkeypatch.setattr(BaseTuner, "_mark_only_adapters_as_trainable", fail)
    with pytest.raises(KeyError, match="on the way"):
        peft.get_peft_model(base, HoraConfig(r=2, target_modules=["0.qkv"], row_order=ONE_MAP))
    assert type(base[0].qkv) is nn.Linear
    assert base[0].qkv_bias_separate is False


def test_four_bits_that_a_cpu_would_pack_for_good_stay_differentiable():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base[0].support_avx512bf16_for_cpu = True
    peft.get_peft_model(base, HoraConfig(r=2, target_modules=["0"]))
    assert [getattr(getattr(one, "base_layer", one), "support_avx512bf16_for_cpu", "none") for one in base] == [
        False,
        "none",
    ]


def test_modules_trained_whole_leave_with_an_adapter_that_could_not_be_loaded(families, tmp_path, monkeypatch):
    family = families["vit"]
    adapted(family, modules_to_save=["classifier"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    base = family.model()
    tensors = peft.load_peft_weights(tmp_path)
    key = next(key for key in tensors if key.endswith("b_in"))
    given = peft.PeftConfig.from_pretrained(tmp_path)
    given.hora_tensors_sha256 = None
    from safetensors.torch import save_file

    save_file(tensors | {key: tensors[key] + torch.inf}, file)
    with pytest.raises(HoraError, match="must be finite"):
        peft.PeftModel.from_pretrained(base, tmp_path, config=given)
    assert type(base.classifier) is nn.Linear
    save_file(tensors, file)  # the directory is good, and what is read of it is not
    monkeypatch.setattr(
        peft.peft_model, "load_peft_weights", lambda *_, **__: tensors | {key: tensors[key] + torch.inf}
    )
    model = adapted(family, modules_to_save=["classifier"])
    with pytest.raises(HoraError, match="is the digest of the tensors"):
        model.load_adapter(tmp_path, "other")
    assert list(model.base_model.model.classifier.modules_to_save) == ["default"]
    assert list(model.peft_config) == ["default"]
    evaluate(model, family.inputs())


def test_tensors_that_a_caller_read_are_looked_at(family):
    loaded = adapted(family)
    state = peft.get_peft_model_state_dict(loaded)
    key = next(key for key in state if key.endswith("b_in"))
    with pytest.raises(HoraError, match="must be floating"):
        peft.set_peft_model_state_dict(loaded, state | {key: state[key].int()})


def test_a_table_is_made_of_what_is_here():
    made = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), HoraConfig(r=2, target_modules=["0"], residual=True))
    assert "_0 open" in hora_torch.report(made)
    made.base_model.model[0].hora_hyper["default"].to("meta")
    assert "elsewhere" in hora_torch.report(made)
