"""What was made from an adapter is read back; a file of another adapter, or a damaged one, does not pass."""

import dataclasses
import json

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
    export_lora,
    param_shapes,
    save_merged,
    verify_export,
)
from safetensors.numpy import load_file, save_file

HEADS, GROUPED = ProjectionShape(4, 3, 8), ProjectionShape(2, 3, 8)
PLACES = {
    "linear": {
        "q": Site("a.q", "weight", (12, 8), Layout(), HEADS),
        "v": Site("a.v", "weight", (6, 8), Layout(), GROUPED),
    },
    "fused": {
        "q": Site("a.qkv", "weight", (24, 8), Layout("(h k) d", Window(0, 0, 12)), HEADS),
        "v": Site("a.qkv", "weight", (24, 8), Layout("(h k) d", Window(0, 18, 24)), GROUPED),
    },
    "interleaved": {"v": Site("a.qkv", "weight", (36, 8), Layout("(h k) d", Window(0, 6, 9, blocks=4)), HEADS)},
    "conv1d": {"q": Site("a.q", "weight", (8, 12), Layout("d (h k)"), HEADS)},
    "convolution": {"q": Site("a.q", "weight", (12, 8, 1, 1), Layout("(h k) d 1 1"), HEADS)},
    "in_proj": {"q": Site("a", "in_proj_weight", (36, 8), Layout("(h k) d", Window(0, 0, 12)), HEADS)},
}


SPECS = {
    "full": AdapterSpec(2, alpha=3.0),
    "none": AdapterSpec(2, alpha=3.0, sharing="none"),
    "gated": AdapterSpec(2, alpha=3.0, residual=True, gate=0.5),
    "fixed": AdapterSpec(2, alpha=3.0, a_source="fixed"),
    "tied": AdapterSpec(2, alpha=3.0, tie_a=True),
    "paper": AdapterSpec.paper(2),
}


def adapter_of(place="linear", method="full", *, seed=0, modules=None):
    layer = AdapterLayer(SPECS[method], PLACES[place], {})
    draw, shapes = np.random.default_rng(seed), param_shapes(layer.spec, layer.shape)
    params = {key: np.float32(draw.normal(size=shape)) for key, shape in shapes.items()}
    return Adapter({"a": dataclasses.replace(layer, params=params)}, modules=modules or {})


def save_base(adapter, path, dtype=np.float32):
    path.mkdir()
    draw = np.random.default_rng(9)
    sites = [site for layer in adapter.layers.values() for site in layer.sites.values()]
    tensors = {f"{s.module}.{s.parameter}": draw.normal(size=s.weight_shape).astype(dtype) for s in sites}
    save_file(tensors | {"norm.weight": np.ones(8, dtype)}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("method", SPECS)
@pytest.mark.parametrize("place", PLACES)
def test_f10_a_lora_export_is_its_adapter_and_no_other(place, method, compact, dtype, tmp_path):
    modules = {"head.weight": np.ones((2, 2), np.float32)}
    export_lora(adapter_of(place, method, modules=modules), tmp_path, compact=compact, dtype=dtype)
    distances = verify_export(adapter_of(place, method), tmp_path)
    assert len(distances) == len({site.module for site in PLACES[place].values()})
    assert max(distances.values()) < 2 * np.finfo(dtype).eps
    with pytest.raises(HoraError, match="got a distance of"):
        verify_export(adapter_of(place, method, seed=1), tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("method", SPECS)
@pytest.mark.parametrize("place", PLACES)
def test_f10_a_merged_checkpoint_is_base_and_adapter(place, method, dtype, tmp_path):
    adapter = adapter_of(place, method)
    base = save_base(adapter, tmp_path / "base", dtype)
    save_merged(adapter, base, tmp_path / "merged")
    assert max(verify_export(adapter, tmp_path / "merged", base=base).values()) < np.finfo(dtype).eps
    with pytest.raises(HoraError, match="rounded once, got another sum"):
        verify_export(adapter_of(place, method, seed=1), tmp_path / "merged", base=base)
    with pytest.raises(HoraError, match="rounded once, got another sum"):
        verify_export(adapter, base, base=base)
    with pytest.raises(HoraError, match=r"pass its directory"):
        verify_export(adapter, tmp_path / "merged")


def change(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_f10_a_changed_tensor_beside_the_adapted_ones_is_seen(tmp_path):
    adapter = adapter_of()
    base = save_base(adapter, tmp_path / "base")
    save_merged(adapter, base, tmp_path / "merged")
    change(tmp_path / "merged/model.safetensors", lambda tensors: tensors["norm.weight"].__setitem__(3, 2.0))
    with pytest.raises(HoraError, match=r"weight differs from the base"):
        verify_export(adapter, tmp_path / "merged", base=base)
    change(tmp_path / "merged/model.safetensors", lambda tensors: tensors.pop("norm.weight"))
    with pytest.raises(HoraError, match=r"weight differs from the base"):
        verify_export(adapter, tmp_path / "merged", base=base)


def test_f10_one_wrong_entry_of_a_sum_is_seen(tmp_path):
    adapter = adapter_of()
    base = save_base(adapter, tmp_path / "base")
    save_merged(adapter, base, tmp_path / "merged")

    def nudge(tensors):
        tensors["a.v.weight"][5, 7] *= 1 + 1e-5

    change(tmp_path / "merged/model.safetensors", nudge)
    with pytest.raises(HoraError, match=r"a\.v is the base plus its update"):
        verify_export(adapter, tmp_path / "merged", base=base)


EDITS = {
    "alpha": (lambda config: config.update(lora_alpha=3), lambda tensors: None, "got a distance of"),
    "a pattern": (lambda config: config.update(alpha_pattern={"v": 5}), lambda tensors: None, "update of a.v is that"),
    "another method": (lambda config: config.update(peft_type="LOHA"), lambda tensors: None, "got LOHA"),
    "a module less": (
        lambda config: None,
        lambda tensors: [tensors.pop(name) for name in list(tensors) if ".a.v." in name],
        r"difference in \['a.v'\]",
    ),
    "half a module": (
        lambda config: None,
        lambda tensors: tensors.pop("base_model.model.a.v.lora_B.weight"),
        "got no a.v.lora_B",
    ),
    "a value": (
        lambda config: None,
        lambda tensors: tensors["base_model.model.a.v.lora_B.weight"].__setitem__((0, 0), 9.0),
        "update of a.v is that",
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_f10_an_edited_lora_export_is_seen(what, tmp_path):
    edit_config, edit_tensors, match = EDITS[what]
    export_lora(adapter_of(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    edit_config(config)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    change(tmp_path / "adapter_model.safetensors", edit_tensors)
    with pytest.raises(HoraError, match=match):
        verify_export(adapter_of(), tmp_path)
