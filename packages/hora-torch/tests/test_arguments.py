"""What users of other methods write: it works, or the error says what it is called here."""

import contextlib
import dataclasses
import json
import math
import re

import hora_spec
import hora_torch
import peft
import pytest
import torch
from hora_spec import HoraError
from hora_torch import HoraConfig
from hora_torch.foreign import UnknownArgumentError

SMALL = {"r": 2, "hidden_dim": 6, "head_embed_dim": 5, "init_weights": False}
FIELDS = {field.name for field in dataclasses.fields(HoraConfig)}
LORA_FIELDS = [field.name for field in dataclasses.fields(peft.LoraConfig) if field.init]


@pytest.fixture
def llama(families):
    return families["llama"]


@pytest.mark.parametrize("name", LORA_FIELDS)
def test_every_argument_of_lora_is_known_or_refused_with_its_name_or_a_reason(name):
    if name in {field.name for field in dataclasses.fields(HoraConfig)}:
        return
    with pytest.raises(UnknownArgumentError, match=f"unexpected keyword argument '{name}': (?!the arguments|did you)"):
        HoraConfig(**{name: None})


@pytest.mark.parametrize(
    ("name", "hint"),
    [("lora_alpha", "called hora_alpha here"), ("hiden_dim", r"\['hidden_dim'"), ("zzz", "the arguments are")],
)
def test_an_unknown_argument_is_python_s_error_and_ours(name, hint):
    with pytest.raises(HoraError, match=hint):
        HoraConfig(**{name: 16})
    with pytest.raises(TypeError, match=hint):
        HoraConfig(**{"r": 2, name: 16})


ODD: list = ["x", "", 3, -1, 0, 2.5, True, [], {}, [1], ["q"], "q v", ("q",), {"q": 1}, {"q": "x"}, {1: 2}, {"q": None}]
ODD += [math.nan, math.inf, b"q", object(), {"q"}, {3}, None]


@pytest.mark.parametrize("name", [name for name in HoraConfig.__annotations__ if name != "hora_layers_sha256"])
def test_a_value_of_any_type_is_kept_or_refused_by_name(name):
    """What is kept can be written and read again; a string is never taken for the list of its letters."""
    kept = []
    for value in ODD:
        with contextlib.suppress(HoraError):
            kept.append((value, HoraConfig(**{name: value})))
    assert len(kept) < len(ODD)
    for value, config in kept:
        read = json.loads(json.dumps(config.to_dict()))
        again = HoraConfig(**{key: value for key, value in read.items() if key in FIELDS})
        assert getattr(again, name) == getattr(config, name)
        assert not isinstance(value, bool) or isinstance(getattr(HoraConfig(), name), bool)


@pytest.mark.parametrize(
    ("name", "value"),
    [("modules_to_save", "head"), ("init_weights", "gaussian"), ("row_order", "q k v"), ("num_heads", [4])],
)
def test_a_value_of_another_type_is_refused_by_the_name_of_its_field(name, value):
    with pytest.raises(HoraError, match=f"{name} is a .*got {re.escape(repr(value))}"):
        HoraConfig(**{name: value})


def test_a_config_file_of_a_newer_version_is_still_peft_s_warning():
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['newer'\]"):
        config = HoraConfig.from_peft_type(peft_type="HORA", r=3, newer=1)
    assert config.r == 3


def test_rslora_divides_by_the_root_of_the_rank_in_every_reader(llama, tmp_path):
    config = HoraConfig(**SMALL, hora_alpha=3.0, use_rslora=True, rank_pattern={"layers.1.self_attn.[qv]_proj": 4})
    model = peft.get_peft_model(llama.model(), config)
    model.save_pretrained(tmp_path)
    layers = hora_spec.load_adapter(tmp_path).layers.values()
    assert [layer.spec.scaling for layer in layers] == pytest.approx([3 / math.sqrt(2), 3 / math.sqrt(4)])
    loaded = peft.PeftModel.from_pretrained(llama.model(), tmp_path)
    inputs = llama.inputs()
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_rslora_without_an_alpha_would_do_nothing_and_is_refused():
    with pytest.raises(HoraError, match="use_rslora divides hora_alpha"):
        HoraConfig(use_rslora=True)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"rank_pattern": {"layers.7.self_attn.q_proj": 4}},
        {"alpha_pattern": {"queries": 4}},
        {"num_heads": {"queries": 4}},
        {"row_order": {"qkv": "q k v"}},
        {"layers_to_transform": [0, 2], "target_modules": ["q_proj", "v_proj"]},
        {"layers_to_transform": 0, "layers_pattern": "blocks", "target_modules": ["q_proj", "v_proj"]},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_what_is_said_of_modules_that_are_no_targets_is_an_error(llama, kwargs):
    with pytest.raises(HoraError, match="|".join(kwargs)):
        hora_torch.plan(llama.model(), HoraConfig(**SMALL | kwargs))


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, "target_modules names ['v_prj'], which no module is called"),
        ({"modules_to_save": ["lm_head", "lm_haed"]}, "modules_to_save names ['lm_haed'], which no module is called"),
    ],
)
def test_a_name_that_no_module_has_is_said(llama, kwargs, said):
    config = HoraConfig(**SMALL, **kwargs)
    assert said in str(hora_torch.plan(llama.model(), config))
    with pytest.warns(UserWarning, match=re.escape(said)):
        peft.get_peft_model(llama.model(), config)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_heads_that_peft_names_for_a_task_are_not_what_a_user_misspelt(families, task):
    peft.get_peft_model(families["bert"].model(), HoraConfig(**SMALL, task_type=task))


def test_trained_tokens_are_trained_saved_exported_and_merged(llama, tmp_path):
    inputs = llama.inputs()
    tokens = inputs["input_ids"].unique()[:3].tolist()
    model = peft.get_peft_model(llama.model(), HoraConfig(**SMALL, trainable_token_indices=tokens)).train()
    before = model.eval()(**inputs).logits.detach()
    optimizer = torch.optim.SGD(hora_torch.param_groups(model, 0.1))
    model.train()(**inputs).logits.square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
    assert not torch.allclose(before, expected)
    model.save_pretrained(tmp_path / "hora")
    hora_torch.export_lora(model, tmp_path / "lora")
    for directory in ("hora", "lora"):
        loaded = peft.PeftModel.from_pretrained(llama.model(), tmp_path / directory).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.merge_and_unload()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_failed_injection_takes_its_trained_tokens_back(llama, monkeypatch):
    model = llama.model()
    names = [name for name, _ in model.named_modules()]
    monkeypatch.setattr(hora_torch.HoraModel, "set_adapter", _fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        peft.get_peft_model(model, HoraConfig(**SMALL, trainable_token_indices=[1], modules_to_save=["lm_head"]))
    assert [name for name, _ in model.named_modules()] == names


def _fail(*args, **kwargs):
    raise RuntimeError("on purpose")
