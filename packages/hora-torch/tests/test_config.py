"""A config is the method of the specification, and says at once what it cannot mean."""

import copy
import json

import hora_spec
import numpy as np
import peft
import pytest
from hora_spec import AdapterSpec, HoraError
from hora_torch import HoraConfig
from torch import nn

from .test_verify import Bypass, small


def saved(path, **kwargs):
    """A directory with a small adapter, and its config."""
    model = peft.get_peft_model(nn.Sequential(Bypass()), small(**kwargs))
    model.save_pretrained(path)
    return json.loads((path / "adapter_config.json").read_text())


def test_an_empty_config_is_the_method_with_the_defaults_of_the_specification():
    config = HoraConfig()
    assert config.spec() == AdapterSpec(8)
    assert (config.seed, config.route, config.bias, config.init_weights) == (0, "auto", "none", True)
    assert config.hora_dropout == 0
    assert config.fused_projections == ("q", "v")
    assert not config.use_rslora
    assert config.peft_type == "HORA"
    assert HoraConfig.from_peft_type(peft_type="HORA").spec() == AdapterSpec(8)


METHOD = {
    "hidden_dim": 5,
    "head_embed_dim": 7,
    "sharing": "b",
    "a_source": "hypernetwork",
    "activation": "relu",
    "gain": 2,
    "residual": True,
    "normalize": False,
    "gate": 1,
}


@pytest.mark.parametrize("name", METHOD)
def test_what_a_config_says_of_the_method_is_that_of_the_spec(name):
    value = METHOD[name]
    others = {"residual": True} if name == "gate" else {"sharing": "full"} if name == "sharing" else {}
    assert getattr(HoraConfig(**others | {name: value}).spec(), name) == value
    assert HoraConfig(**others | {name: value}).spec() == AdapterSpec(8, **others | {name: value})


@pytest.mark.parametrize("name", ["r", "hidden_dim", "head_embed_dim"])
def test_numbers_of_numpy_are_numbers(name):
    assert HoraConfig(**{name: np.int64(4)}).spec() == HoraConfig(**{name: 4}).spec()


def test_a_layer_may_have_a_rank_and_an_alpha_of_its_own():
    config = HoraConfig(r=4, hora_alpha=3)
    assert (config.spec().rank, config.spec().scaling) == (4, 0.75)
    assert config.spec(6) == AdapterSpec(6, alpha=3.0)
    assert config.spec(alpha=8.0) == AdapterSpec(4, alpha=8.0)
    assert config.spec(6, 12.0).scaling == 2
    assert HoraConfig(r=4).spec(6) == AdapterSpec(6)
    assert HoraConfig(r=4).spec().scaling == 1


def test_rslora_divides_by_the_root_of_the_rank():
    config = HoraConfig(r=4, hora_alpha=3, use_rslora=True)
    assert config.spec().scaling == 1.5
    assert config.spec(9, 6.0).scaling == 2
    by_layer = HoraConfig(r=4, use_rslora=True, alpha_pattern={"q_proj": 8})
    assert by_layer.spec().scaling == 1
    assert by_layer.spec(alpha=8.0).scaling == 4
    with pytest.raises(HoraError, match="use_rslora divides hora_alpha"):
        HoraConfig(use_rslora=True)


REFUSED = {
    "another version": ({"hora_spec_version": 2}, r"spec version 1, got 2.*\(spec F4\)"),
    "a dropout of one": ({"hora_dropout": 1}, r"\[0, 1\), got 1"),
    "a negative dropout": ({"hora_dropout": -0.1}, "got -0.1"),
    "an unknown route": ({"route": "fast"}, "route must be one of"),
    "an unknown bias": ({"bias": "lora_only"}, "bias must be one of"),
    "no projections": ({"fused_projections": ()}, "fused_projections are names"),
    "projections that are no names": ({"fused_projections": ("q", "1")}, "fused_projections are names"),
    "an order that is none": ({"row_order": {"qkv": "q k v", "other": "[head"}}, "order"),
    "a pattern of no layers": ({"layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
    "layers beside an expression": ({"target_modules": "q.*", "layers_to_transform": [0]}, "layer numbers into"),
    "layers beside all": ({"target_modules": "all-linear", "layers_to_transform": 0}, "layer numbers into"),
    "a list of letters": ({"modules_to_save": "head"}, "modules_to_save is a"),
    "a truth for a number": ({"seed": True}, "seed is a int, got True"),
    "a number for a truth": ({"init_weights": 1}, "init_weights is a bool, got 1"),
    "layers that a digest does not know": (
        {"hora_layers": [], "hora_layers_sha256": "0" * 64},
        "hora_layers",
    ),
    "a rank below one": ({"r": 0}, "rank"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_config_cannot_mean_is_refused_when_it_is_written(case):
    kwargs, message = REFUSED[case]
    with pytest.raises(HoraError, match=message):
        HoraConfig(**kwargs)


KEPT = {
    "no dropout": {"hora_dropout": 0},
    "almost one": {"hora_dropout": 0.99},
    "an expression": {"target_modules": "q.*"},
    "layers and their pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "h",
    },
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    "layers of the default": {"layers_to_transform": 0},
    "an order": {"row_order": {"qkv": "q k v"}},
    "biases": {"bias": "hora_only"},
}


@pytest.mark.parametrize("case", KEPT)
def test_what_it_can_mean_is_kept(case):
    config = HoraConfig(**KEPT[case])
    for name, value in KEPT[case].items():
        assert getattr(config, name) == ({*value} if name == "target_modules" and isinstance(value, list) else value)


def test_peft_s_own_fields_are_checked_by_peft():
    with pytest.raises(ValueError, match="task"):
        HoraConfig(task_type="NONE_SUCH")


def test_equal_configs_write_equal_values():
    one = HoraConfig(target_modules=["v_proj", "q_proj"], exclude_modules=("b", "a"), fused_projections=["q", "k"])
    other = HoraConfig(target_modules=("q_proj", "v_proj"), exclude_modules={"a", "b"}, fused_projections=("q", "k"))
    assert one.target_modules == other.target_modules == {"q_proj", "v_proj"}
    assert json.dumps(one.to_dict()) == json.dumps(other.to_dict())
    assert one.to_dict()["target_modules"] == ["q_proj", "v_proj"]
    assert one.to_dict()["exclude_modules"] == ["a", "b"]
    assert one.to_dict()["fused_projections"] == ["q", "k"]
    assert "hora_layers_sha256" not in one.to_dict()


def test_a_saved_config_describes_its_layers_and_tensors_and_has_a_card(tmp_path):
    written = saved(tmp_path)
    assert written["hora_layers_sha256"]
    assert written["hora_tensors_sha256"]
    assert "import hora_torch" in (tmp_path / "README.md").read_text()
    config = HoraConfig.from_pretrained(tmp_path)
    assert config.given_layers == config.hora_layers == written["hora_layers"]
    assert config.to_dict()["hora_layers_sha256"] == written["hora_layers_sha256"]
    assert HoraConfig().given_layers is None


def test_a_damaged_directory_is_refused_with_its_config(tmp_path):
    whole = saved(tmp_path)
    (tmp_path / "nested").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "nested" / file).write_bytes((tmp_path / file).read_bytes())
    assert HoraConfig.from_pretrained(tmp_path, subfolder="nested").hora_layers == whole["hora_layers"]
    tensors = tmp_path / "nested" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4] + b"\0\0\0\1")
    for read in (
        lambda: HoraConfig.from_pretrained(tmp_path, subfolder="nested"),
        lambda: HoraConfig.from_pretrained(tmp_path / "nested"),
        lambda: HoraConfig.from_json_file(tmp_path / "nested" / "adapter_config.json"),
    ):
        with pytest.raises(HoraError, match=r"\(spec F7\)"):
            read()
    assert HoraConfig.from_pretrained(tmp_path).hora_layers == whole["hora_layers"]
    assert HoraConfig.from_json_file(tmp_path / "adapter_config.json")["hora_layers"] == whole["hora_layers"]


def test_a_config_without_its_tensors_is_no_adapter_and_may_be_read(tmp_path):
    whole = saved(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert HoraConfig.from_json_file(tmp_path / "adapter_config.json")["hora_layers"] == whole["hora_layers"]
    with pytest.raises(HoraError, match="lacks the tensors"):
        HoraConfig.from_pretrained(tmp_path)


def test_an_argument_of_another_method_is_refused_with_its_name_here():
    with pytest.raises(HoraError, match="called hora_alpha here"):
        HoraConfig(lora_alpha=16)


def test_who_writes_tensors_later_than_the_config_writes_no_digest_of_them(tmp_path):
    """As Transformers does; PEFT is told by its keyword."""
    saved(tmp_path)
    config = HoraConfig.from_pretrained(tmp_path)
    for kwargs, digest in (({}, False), ({"auto_mapping_dict": None}, True)):
        config.hora_tensors_sha256 = "1" * 64
        before = copy.copy(config)
        config.save_pretrained(tmp_path, **kwargs)
        written = json.loads((tmp_path / "adapter_config.json").read_text())
        assert bool(written["hora_tensors_sha256"]) == digest
        assert written["hora_tensors_sha256"] != before.hora_tensors_sha256
        assert config.hora_tensors_sha256 is None
    assert hora_spec.load_adapter(tmp_path).layers
