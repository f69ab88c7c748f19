"""The command ``hora``."""

import re
import subprocess
import sys

import numpy as np
import pytest
from hora_spec import (
    Adapter,
    AdapterLayer,
    AdapterSpec,
    Layout,
    ProjectionShape,
    Site,
    Window,
    param_shapes,
    reference,
    save_adapter,
)
from hora_spec.__main__ import delta_norms, main
from safetensors.numpy import save_file


def layer_of(spec, path, seed):
    q = Site(f"{path}.qkv", "weight", (12, 4), Layout("(h k) d", Window(0, 0, 4)), ProjectionShape(2, 2, 4))
    v = Site(f"{path}.qkv", "weight", (12, 4), Layout("(h k) d", Window(0, 8, 12)), ProjectionShape(2, 2, 4))
    layer, draw = AdapterLayer(spec, {"q": q, "v": v}, {}), np.random.default_rng(seed)
    shapes = param_shapes(spec, layer.shape)
    return AdapterLayer(spec, layer.sites, {key: np.float32(draw.normal(size=s)) for key, s in shapes.items()})


@pytest.fixture
def adapter():
    spec = AdapterSpec(2, hidden_dim=3, head_embed_dim=4, alpha=3.0)
    return Adapter(
        {f"blocks.{i}.attn": layer_of(spec.replace(rank=2 + i), f"blocks.{i}.attn", i) for i in range(2)},
        {"base_model_name_or_path": "some/base"},
        {"head.weight": np.zeros((3, 4), np.float32)},
    )


@pytest.fixture
def saved(adapter, tmp_path):
    save_adapter(tmp_path / "adapter", adapter)
    return tmp_path / "adapter"


def test_inspect_prints_layers_shapes_parameters_and_norms(adapter, saved, capsys):
    assert main(["inspect", str(saved)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "base model some/base"
    assert lines[1].startswith("HoRA rank 2, hidden_dim 3, head_embed_dim 4, alpha 3.0, sharing full")
    table = [re.split(r"  +", line.strip()) for line in lines if "blocks" in line]
    norms = {name: delta_norms(layer) for name, layer in adapter.layers.items()}
    for i, row in enumerate(table[::2]):
        name = f"blocks.{i}.attn"
        count = sum(array.size for array in adapter.layers[name].params.values())
        sizes, norm = ["2", "2", "4"], f"{norms[name]['q']:.4g}"
        assert row == [name, str(2 + i), str(count), "q", f"{name}.qkv", "(h k) d [0:4]", *sizes, norm]
    assert [row[0] for row in table[1::2]] == ["v", "v"]
    total = sum(array.size for layer in adapter.layers.values() for array in layer.params.values())
    assert f"2 layers, 4 projections, {total} HoRA parameters" in out
    assert lines[-1] == "1 tensors of modules trained whole, 12 values"


@pytest.mark.parametrize("sharing", ["full", "a", "b", "none"])
def test_inspect_norms_are_those_of_the_dense_delta(sharing):
    layer = layer_of(AdapterSpec(2, sharing=sharing, alpha=5.0), "a", 0)
    for p, delta in reference.delta(layer.spec, layer.shape, layer.params).items():
        assert delta_norms(layer)[p] == pytest.approx(np.linalg.norm(delta), rel=1e-12)


def test_export_lora_writes_a_directory(saved, tmp_path, capsys):
    assert main(["export-lora", str(saved), str(tmp_path / "lora")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'lora'}: LoRA adapter of rank 6\n"
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_export_lora_says_what_a_server_is_started_with(saved, tmp_path, capsys):
    assert main(["export-lora", str(saved), str(tmp_path / "lora"), "--for-server", "llama.cpp"]) == 2
    assert "llama.cpp takes no such LoRA adapter" in capsys.readouterr().err
    assert main(["export-lora", str(saved), str(tmp_path / "lora"), "--compact", "--dtype", "float64"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'lora'}: LoRA adapter of rank 4, 6\n"


def test_export_lora_for_vllm_names_its_option(adapter, tmp_path, capsys):
    save_adapter(tmp_path / "adapter", Adapter(adapter.layers))
    assert main(["export-lora", str(tmp_path / "adapter"), str(tmp_path / "lora"), "--for-server", "vllm"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'lora'}: LoRA adapter of rank 6 (vLLM: --max-lora-rank 8)\n"


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    names = ("blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight")
    tensors = {name: np.ones((12, 4), np.float32) for name in names} | {"head.weight": np.ones((3, 4), np.float32)}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def test_merge_and_verify(saved, base, tmp_path, capsys):
    assert main(["verify", str(saved)]) == 0
    assert capsys.readouterr().out == f"{saved}: whole, 2 layers\n"
    assert main(["merge", str(saved), str(base), str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'out'}: merged model, 3 tensors changed, blocks.0.attn.qkv.weight to head")
    assert err == ""  # progress is for people
    assert main(["verify", str(saved), str(tmp_path / "out"), "--base", str(base)]) == 0
    assert "the same updates, 2 weights within" in capsys.readouterr().out
    assert main(["export-lora", str(saved), str(tmp_path / "lora")]) == 0
    assert main(["verify", str(saved), str(tmp_path / "lora")]) == 0
    assert main(["verify", str(saved), str(base), "--base", str(base)]) == 2
    assert "got another sum" in capsys.readouterr().err


def test_merge_shows_people_how_far_it_is(saved, base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["merge", str(saved), str(base), str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().err
    assert shown.startswith("\r")
    assert shown.endswith("100 % of 0.0 GB\n")


@pytest.mark.parametrize(
    ("command", "match"),
    [
        (["inspect", "absent"], "spec F1"),
        (["export-lora", "adapter", "adapter"], "spec F3"),
        (["export-gguf", "adapter", "out.gguf", "--base", "absent.gguf"], "whole|gguf"),
        (["merge", "adapter", "absent", "out"], "a checkpoint is a directory"),
        (["verify", "adapter", "absent", "--base", "absent"], "a checkpoint is a directory"),
    ],
)
def test_e1_bad_input_is_one_line_and_exit_code_2(saved, command, match, capsys, monkeypatch):
    monkeypatch.chdir(saved.parent)
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(match, err)
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_the_module_runs(saved):
    run = subprocess.run([sys.executable, "-m", "hora_spec", "inspect", saved], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "blocks.1.attn" in run.stdout
    assert subprocess.run([sys.executable, "-m", "hora_spec"], capture_output=True).returncode == 2


def test_a_reader_that_has_seen_enough_is_no_error(saved):
    run = subprocess.Popen(
        [sys.executable, "-m", "hora_spec", "inspect", saved], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run.stdout.close()
    assert (run.stderr.read(), run.wait()) == ("", 0)
    run.stderr.close()


def test_f1_adapters_in_folders_are_named(saved, tmp_path, capsys):
    (tmp_path / "all").mkdir()
    saved.rename(tmp_path / "all/other")
    assert main(["inspect", str(tmp_path / "all")]) == 2
    assert "there are adapters in its folders other, name one of them" in capsys.readouterr().err
