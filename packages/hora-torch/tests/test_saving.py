"""PEFT's two files are a pair: a torn one is refused before the model changes, and no whole one ever is (spec F7)."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import hora_spec
import peft
import pytest
import torch
from hora_spec import HoraError, directory
from hora_torch import HoraConfig, to_adapter
from hora_torch.saving import check_loaded, written_digest
from hypothesis import settings
from safetensors.torch import load_file, save_file

CONFIG, TENSORS = directory.CONFIG, directory.TENSORS
TORN = "a save was interrupted"


def adapted(family, seed=0, **kwargs):
    """A model with an adapter that is not zero; another seed gives other values of the same shapes."""
    torch.manual_seed(seed)
    sizes = {"r": 2, "hidden_dim": 6, "head_embed_dim": 5, "init_weights": False, "seed": seed}
    base = family.model()
    torch.manual_seed(seed)
    return peft.get_peft_model(base, HoraConfig(**sizes | kwargs))


def values(model, name="default"):
    """Everything that an adapter holds."""
    return {key: value.clone() for key, value in peft.get_peft_model_state_dict(model, adapter_name=name).items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=0)


def digests(path):
    config = json.loads((Path(path) / CONFIG).read_text())
    return config.get("hora_layers_sha256"), config.get("hora_tensors_sha256")


@pytest.fixture
def family(families):
    return families["llama"]


@pytest.fixture
def torn(family, tmp_path, request):
    """Config and tensors of two adapters that differ in nothing but values and alpha."""
    adapted(family).save_pretrained(tmp_path / "torn")
    adapted(family, seed=1, hora_alpha=16.0).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / request.param, tmp_path / "torn")
    return tmp_path / "torn"


both = pytest.mark.parametrize("torn", [CONFIG, TENSORS], indirect=True)


@both
def test_f7_a_torn_pair_is_refused_before_the_model_changes(torn, family):
    model = family.model()
    before = {name: type(module) for name, module in model.named_modules()}
    for load in (peft.PeftModel.from_pretrained, peft.PeftModelForCausalLM.from_pretrained):
        with pytest.raises(HoraError, match=TORN):
            load(model, torn)
    assert {name: type(module) for name, module in model.named_modules()} == before


@both
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_f7_a_torn_second_adapter_leaves_the_first_one_alone(torn, family, low_cpu_mem_usage):
    model = adapted(family, seed=2)
    before = values(model)
    with pytest.raises(HoraError, match=TORN):
        model.load_adapter(torn, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert list(model.peft_config) == ["default"]
    assert_same(values(model), before)


@both
def test_f7_a_torn_pair_is_refused_whoever_read_the_config(torn, family):
    for is_trainable in (True, False):
        config = peft.PeftConfig.from_pretrained(torn)  # not by HoraConfig, so the tensors were not looked at
        with pytest.raises(HoraError, match=TORN):
            peft.PeftModel.from_pretrained(family.model(), torn, config=config, is_trainable=is_trainable)


def test_f7_a_pair_replaced_while_it_is_loaded_is_refused(family, tmp_path, monkeypatch):
    adapted(family).save_pretrained(tmp_path)
    inject = peft.PeftModel.add_adapter

    def replaced(*args, **kwargs):
        inject(*args, **kwargs)
        adapted(family, seed=1).save_pretrained(tmp_path)

    model = adapted(family, seed=2)
    monkeypatch.setattr(peft.PeftModel, "add_adapter", replaced)
    with pytest.raises(HoraError, match=TORN):
        model.load_adapter(tmp_path, "second")


@pytest.mark.parametrize("directory_of", ["default", "other"])
def test_f7_a_save_that_ends_between_the_files_is_seen(family, tmp_path, monkeypatch, directory_of):
    model = adapted(family)
    model.add_adapter("other", HoraConfig(r=2, hidden_dim=6, head_embed_dim=5, init_weights=False))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HoraConfig, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(tmp_path, selected_adapters=[directory_of])
    path = tmp_path if directory_of == "default" else tmp_path / "other"
    for load in (hora_spec.load_adapter, lambda path: peft.PeftModel.from_pretrained(family.model(), path)):
        with pytest.raises(HoraError, match=TORN):
            load(path)
    model.save_pretrained(tmp_path)
    assert_same(values(peft.PeftModel.from_pretrained(family.model(), path)), values(model, directory_of))


def test_f7_a_crash_between_the_renames_of_the_other_writer_leaves_the_new_adapter(family, tmp_path, monkeypatch):
    first, second = adapted(family), adapted(family, seed=1, hora_alpha=16.0)
    hora_spec.save_adapter(tmp_path, to_adapter(first))
    replace = os.replace

    def crash(source, target):
        if Path(target).name == CONFIG:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            hora_spec.save_adapter(tmp_path, to_adapter(second))
    loaded = peft.PeftModel.from_pretrained(family.model(), tmp_path)
    assert_same(values(loaded), values(second))
    assert loaded.peft_config["default"].hora_alpha == 16.0


@pytest.mark.parametrize("kind", ["fifo", "directory", "loop", "truncated", "junk"])
def test_f5_tensors_that_are_no_whole_regular_file_are_refused_at_once(family, tmp_path, kind):
    adapted(family).save_pretrained(tmp_path)
    path = tmp_path / TENSORS
    data = path.read_bytes()
    path.unlink()
    {
        "fifo": lambda: os.mkfifo(path),
        "directory": path.mkdir,
        "loop": lambda: path.symlink_to(path),
        "truncated": lambda: path.write_bytes(data[:-1]),
        "junk": lambda: path.write_bytes(b"\xff" * len(data)),
    }[kind]()
    model = family.model()
    with pytest.raises(HoraError, match="spec F5"):
        peft.PeftModel.from_pretrained(model, tmp_path)
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "adapter", "save"),
    [
        ("llama", {}, {}),
        ("llama", {"modules_to_save": ["lm_head"]}, {}),
        ("llama", {"modules_to_save": ["embed_tokens", "norm"]}, {}),
        ("llama", {}, {"save_embedding_layers": True}),
        ("llama", {}, {"safe_serialization": False}),
        ("gpt2", {}, {}),
        ("bert", {"bias": "all"}, {}),
        ("bert", {"bias": "hora_only"}, {}),
        ("timm-vit", {}, {}),
        ("mha", {}, {}),
        ("mha-cross", {}, {}),
    ],
)
def test_f7_whatever_peft_saves_it_loads(families, tmp_path, name, adapter, save):
    model = adapted(families[name], **adapter)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    model.save_pretrained(tmp_path, **save)
    assert None not in digests(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = peft.PeftModel.from_pretrained(families[name].model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert_same(values(loaded), values(model))
        assert loaded.peft_config["default"].hora_tensors_sha256 is None
    second = adapted(families[name], seed=3)
    second.load_adapter(tmp_path, "second")
    assert_same(values(second, "second"), values(model))


def test_f7_parameters_that_share_memory_are_saved_and_loaded(family, tmp_path):
    model = adapted(family)
    first, second = (m for m in model.modules() if type(m).__name__ == "HoraLinear" and m.hora_hyper)
    for name, parameter in first.hora_hyper["default"].named_parameters():
        second.hora_hyper["default"].get_parameter(name).data = parameter.data
    model.save_pretrained(tmp_path)
    assert_same(values(peft.PeftModel.from_pretrained(family.model(), tmp_path)), values(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_f7_adapters_in_the_dtype_of_the_base_are_saved_and_loaded(family, tmp_path, dtype):
    config = HoraConfig(r=2, hidden_dim=6, head_embed_dim=5, init_weights=False)
    model = peft.get_peft_model(family.model().to(dtype), config, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(family.model().to(dtype), tmp_path, autocast_adapter_dtype=False)
    assert_same(values(loaded), values(model))
    assert {value.dtype for value in values(loaded).values()} == {dtype}


def test_f7_a_config_saved_again_keeps_the_adapter_loadable(family, tmp_path):
    model = adapted(family)
    model.save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    config.hora_dropout = 0.5
    config.save_pretrained(tmp_path)
    assert digests(tmp_path)[1] is None
    assert_same(values(peft.PeftModel.from_pretrained(family.model(), tmp_path)), values(model))
    hora_spec.load_adapter(tmp_path)


def test_f7_a_config_saved_ahead_of_its_tensors_is_no_obstacle(family, tmp_path):
    """Transformers writes the config first, here over an adapter of PEFT's."""
    adapted(family).save_pretrained(tmp_path)
    model = family.model()
    torch.manual_seed(1)
    model.add_adapter(HoraConfig(r=2, hidden_dim=6, head_embed_dim=5, init_weights=False))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(family.model(), tmp_path)
    expected = {f"base_model.model.{key}": value for key, value in model.get_adapter_state_dict().items()}
    assert_same(values(loaded), expected)
    native = family.model()
    native.load_adapter(str(tmp_path))
    assert_same(native.get_adapter_state_dict(), model.get_adapter_state_dict())


def test_f7_pickled_tensors_beside_older_safetensors_are_not_mistaken_for_them(family, tmp_path):
    adapted(family).save_pretrained(tmp_path)
    os.utime(tmp_path / TENSORS, ns=(0, 0))
    model = adapted(family, seed=1)
    model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(HoraError, match=TORN):
        peft.PeftModel.from_pretrained(family.model(), tmp_path)
    (tmp_path / TENSORS).unlink()
    assert_same(values(peft.PeftModel.from_pretrained(family.model(), tmp_path)), values(model))


def test_f7_tensors_written_anew_by_another_tool_are_the_same_tensors(family, tmp_path):
    model = adapted(family)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    save_file(dict(reversed(tensors.items())), tmp_path / TENSORS, metadata={"made": "elsewhere"})
    assert_same(values(peft.PeftModel.from_pretrained(family.model(), tmp_path)), values(model))
    hora_spec.load_adapter(tmp_path)


def test_f7_an_adapter_trained_further_is_saved_and_loaded_again(family, tmp_path):
    adapted(family).save_pretrained(tmp_path / "first")
    model = peft.PeftModel.from_pretrained(family.model(), tmp_path / "first", is_trainable=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    model.save_pretrained(tmp_path / "checkpoint")
    best = values(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    model.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)  # as the Trainer loads its best model
    assert_same(values(model), best)
    peft.set_peft_model_state_dict(model, load_file(tmp_path / "first" / TENSORS))


def test_f7_a_config_read_for_its_settings_does_not_judge_later_checkpoints(family, tmp_path):
    adapted(family).save_pretrained(tmp_path / "first")
    config = peft.PeftConfig.from_pretrained(tmp_path / "first")
    config.inference_mode = False
    model = peft.get_peft_model(family.model(), config)
    model.save_pretrained(tmp_path / "checkpoint")
    model.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)


def test_f7_a_model_without_a_wrapper_takes_the_tensors_with_or_without_prefix(family, tmp_path):
    adapted(family).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    for given in (tensors, {key.removeprefix("base_model.model."): value for key, value in tensors.items()}):
        model = peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(tmp_path), family.model())
        peft.set_peft_model_state_dict(model, given)
        assert_same(values(model), {key.removeprefix("base_model.model."): value for key, value in tensors.items()})
        model = peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(tmp_path), family.model())
        with pytest.raises(HoraError, match=TORN):
            peft.set_peft_model_state_dict(model, {key: 2 * value for key, value in given.items()})


def test_f7_files_of_the_hub_are_links(family, tmp_path):
    model = adapted(family)
    model.save_pretrained(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in (CONFIG, TENSORS):
        (tmp_path / "snapshot" / name).symlink_to(Path("..") / "blobs" / name)
    assert_same(values(peft.PeftModel.from_pretrained(family.model(), tmp_path / "snapshot")), values(model))


def test_f7_an_adapter_in_memory_has_no_digest(family, tmp_path):
    model = adapted(family)
    model.save_pretrained(tmp_path)
    for one in (model, peft.PeftModel.from_pretrained(family.model(), tmp_path)):
        assert not to_adapter(one).config.keys() & {"hora_layers_sha256", "hora_tensors_sha256"}


def test_f7_a_changed_layer_table_is_refused_by_the_config_itself(family, tmp_path):
    adapted(family).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["hora_layers"][0]["spec"]["activation"] = "relu"
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(HoraError, match="hora_layers_sha256"):
        peft.PeftConfig.from_pretrained(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are POSIX")
def test_f7_no_kill_while_peft_saves_leaves_a_pair_that_loads_wrong(tmp_path):
    rounds = settings.default.max_examples  # 25; 500 under the profile nightly
    scripts = [str(Path(__file__).with_name(name)) for name in ("launched.py", "killed_saves.py")]
    command = [sys.executable, *scripts, str(tmp_path), str(rounds)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("name", [CONFIG, "renamed.json"])
def test_f7_a_torn_pair_is_refused_where_its_config_is_read_as_json(family, tmp_path, name):
    """Only beside tensors of the same adapter is a config one of a pair."""
    adapted(family).save_pretrained(tmp_path)
    adapted(family, seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / TENSORS, tmp_path)
    (tmp_path / CONFIG).rename(tmp_path / name)
    if name != CONFIG:
        assert HoraConfig.from_json_file(str(tmp_path / name))["hora_layers"]
        return
    with pytest.raises(HoraError, match=TORN):
        HoraConfig.from_json_file(str(tmp_path / name))


def test_f1_a_directory_without_tensors_is_refused_unless_its_config_describes_no_layers(family, tmp_path):
    adapted(family).save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / TENSORS).unlink()
    with pytest.raises(HoraError, match="lacks the tensors"):
        HoraConfig.from_pretrained(tmp_path / "whole")
    HoraConfig(r=3).save_pretrained(str(tmp_path / "settings"))
    assert HoraConfig.from_pretrained(tmp_path / "settings").r == 3


UNSOUND = {
    "codes": ("layers.0.hora_hyper.b_in", torch.ones(2, dtype=torch.int32), "must be floating"),
    "no number": ("layers.0.hora_hyper.b_in", torch.tensor([1.0, torch.nan]), "must be finite"),
    "no number in a whole module": ("lm_head.weight", torch.tensor([torch.nan]), "must be finite"),
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_f5_tensors_that_somebody_else_read_are_looked_at_when_they_are_loaded(family, kind):
    """Nobody checked the file: they came from a hub, a pickle or memory."""
    key, tensor, message = UNSOUND[kind]
    model = adapted(family)
    config = model.peft_config["default"]
    with pytest.raises(HoraError, match=message):
        check_loaded(model, config, "default", {"sound": torch.ones(1), key: tensor})
    fine = {
        "lm_head.codes": torch.ones(2, dtype=torch.int32),
        key: torch.ones(1),
        "elsewhere": torch.ones(1, device="meta"),
    }
    check_loaded(model, config, "default", fine)


class Planted:
    """Unpickling it leaves a trace."""

    def __reduce__(self):
        return os.mkdir, ("trace",)


def test_f7_no_code_of_a_pickle_runs_to_find_its_digest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"key": Planted()}, tmp_path / "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        written_digest(tmp_path)
    assert not (tmp_path / "trace").exists()


def test_f7_tensors_that_another_process_is_writing_have_no_digest(tmp_path):
    (tmp_path / TENSORS).write_bytes(b"\0" * 4)
    assert written_digest(tmp_path) is None
