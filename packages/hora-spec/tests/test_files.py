"""Adapters on disk: what a directory holds, how it is replaced, and what is refused."""

import dataclasses
import json
import struct

import numpy as np
import pytest
from hora_spec import (
    Adapter,
    AdapterLayer,
    AdapterSpec,
    HoraError,
    Layout,
    ProjectionShape,
    Site,
    Window,
    load_adapter,
    param_shapes,
    save_adapter,
)
from safetensors.numpy import load_file

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"


def separate(index, spec):
    """Grouped-query attention with a query and a value module; q comes first in the model."""
    path = f"model.layers.{index}.attn"
    return (
        path,
        spec,
        {
            "q": Site(f"{path}.q_proj", "weight", (12, 8), Layout(), ProjectionShape(4, 3, 8)),
            "k": Site(f"{path}.k_proj", "weight", (6, 8), Layout(), ProjectionShape(2, 3, 8)),
        },
    )


def fused(index, spec):
    """A fused Conv1D: columns q, k, v."""
    path, shape = f"h.{index}.attn", ProjectionShape(2, 2, 4)
    sites = {p: Site(f"{path}.c_attn", "weight", (4, 12), Layout("d (h k)", w), shape) for p, w in WINDOWS.items()}
    return path, spec, sites


WINDOWS = {"q": Window(1, 0, 4), "v": Window(1, 8, 12)}
SPEC = AdapterSpec(2, hidden_dim=3, head_embed_dim=4, alpha=3.0, residual=True)


def filled(name, spec, sites, seed=0):
    """A layer whose parameters are all non-zero, the first of them hard to print."""
    layer = AdapterLayer(spec, sites, {})
    draw = np.random.default_rng(seed)
    params = {key: draw.normal(size=shape).astype(np.float32) for key, shape in param_shapes(spec, layer.shape).items()}
    params[next(iter(params))].flat[0] = np.float32(0.1)
    return {name: dataclasses.replace(layer, params=params)}


def example(seed=0, **config):
    layers = filled(*separate(0, SPEC), seed) | filled(*separate(1, SPEC.replace(rank=3)), seed + 1)
    layers |= filled(*fused(0, AdapterSpec.paper(2)), seed + 2)
    modules = {"score.weight": np.arange(6, dtype=np.float16).reshape(2, 3), "norm.count": np.array(3)}
    return Adapter(layers, {"task_type": "SEQ_CLS", "modules_to_save": ["score"], **config}, modules)


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def assert_equal(one, other):
    assert list(one.layers) == list(other.layers)
    for name, layer in one.layers.items():
        same = other.layers[name]
        assert (layer.spec, dict(layer.sites), layer.leader) == (same.spec, dict(same.sites), same.leader)
        assert list(layer.params) == list(same.params)
        for key in layer.params:
            np.testing.assert_array_equal(layer.params[key], same.params[key], strict=True)
    assert one.modules.keys() == other.modules.keys()
    for key, value in one.modules.items():
        np.testing.assert_array_equal(value, other.modules[key], strict=True)


@pytest.fixture
def saved(tmp_path):
    save_adapter(tmp_path / "adapter", example())
    return tmp_path / "adapter"


def edit(directory, change):
    """Change the config of a directory."""
    config = json.loads((directory / CONFIG).read_text())
    change(config)
    (directory / CONFIG).write_text(json.dumps(config))


def refused(directory, match):
    """Reading fails with that message and leaves the directory alone."""
    before = content(directory) if directory.is_dir() else None
    with pytest.raises(HoraError, match=match):
        load_adapter(directory)
    assert before == (content(directory) if directory.is_dir() else None)


def test_f1_an_adapter_is_a_peft_directory(saved):
    config = json.loads((saved / CONFIG).read_text())
    assert sorted(content(saved)) == [CONFIG, TENSORS]
    assert (config["peft_type"], config["r"], config["hora_alpha"]) == ("HORA", 2, 3.0)
    assert config["rank_pattern"] == {
        r"^model\.layers\.1\.attn\.q_proj": 3,
        r"^model\.layers\.1\.attn\.k_proj": 3,
    }
    assert config["target_modules"][:2] == ["model.layers.0.attn.q_proj", "model.layers.0.attn.k_proj"]
    tensors = load_file(saved / TENSORS)
    assert "base_model.model.model.layers.0.attn.q_proj.hora_hyper.b_out.k" in tensors
    assert "base_model.model.h.0.attn.c_attn.hora_hyper.a_seed" in tensors
    assert {t.dtype for key, t in tensors.items() if "hora_hyper" in key} == {np.dtype(np.float32)}
    assert tensors["base_model.model.score.weight"].dtype == np.float16


def test_f1_load_is_the_inverse_of_save(saved, tmp_path):
    adapter = load_adapter(saved)
    assert_equal(adapter, example())
    assert adapter.config["task_type"] == "SEQ_CLS"
    save_adapter(tmp_path / "again", adapter)
    assert content(tmp_path / "again") == content(saved)


def test_f1_other_keys_of_the_config_survive(tmp_path):
    save_adapter(tmp_path, example(target_modules="all-linear", route="auto", auto_mapping={"a": None}))
    config = load_adapter(tmp_path).config
    assert (config["target_modules"], config["route"], config["auto_mapping"]) == ("all-linear", "auto", {"a": None})


def test_f1_equal_tensors_give_equal_bytes(tmp_path):
    adapter = example()
    shuffled = Adapter(dict(reversed(adapter.layers.items())), {"other": 1}, dict(reversed(adapter.modules.items())))
    save_adapter(tmp_path / "one", adapter)
    save_adapter(tmp_path / "other", shuffled)
    data = (tmp_path / "one" / TENSORS).read_bytes()
    assert data == (tmp_path / "other" / TENSORS).read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    assert header["__metadata__"] == {"format": "pt"}


def test_f1_bfloat16_of_whole_modules_is_read_exactly(saved):
    key, values = b"base_model.model.score.weight", np.array([1.5, -2.0, 3.140625], np.float32)
    bits = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    tensors = {k: v for k, v in load_file(saved / TENSORS).items() if k.encode() != key}
    header, data = {key.decode(): {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}, bits
    for name, value in tensors.items():
        dtype = {"float32": "F32", "int64": "I64"}[value.dtype.name]
        offsets = [len(data), len(data) + value.nbytes]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": offsets}
        data += value.tobytes()
    text = json.dumps(header).encode()
    (saved / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data)
    np.testing.assert_array_equal(load_adapter(saved).modules["score.weight"], values, strict=True)
