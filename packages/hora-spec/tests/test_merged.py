"""Merging into a checkpoint on disk: sums are right to the last bit, all else is copied, nothing is half done."""

import itertools
import json
import tracemalloc

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
    param_shapes,
    reference,
    save_merged,
)
from hora_spec.tensors import Stored, decode
from safetensors.numpy import save_file

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

DTYPES = {"F16": np.float16, "BF16": bfloat16, "F32": np.float32, "F64": np.float64}
EPS = {"F16": 2.0**-10, "BF16": 2.0**-7, "F32": 2.0**-23, "F64": 2.0**-52}
HEADS, GROUPED = ProjectionShape(4, 3, 8), ProjectionShape(2, 3, 8)
BLOCK = "model.layers.{}.self_attn"


def split(block):
    return {
        "q": Site(f"{block}.q_proj", "weight", (12, 8), Layout(), HEADS),
        "v": Site(f"{block}.v_proj", "weight", (6, 8), Layout(), GROUPED),
    }


def fused(block):
    rows = {"q": Window(0, 0, 12), "v": Window(0, 18, 24)}
    shapes = {"q": HEADS, "v": GROUPED}
    return {p: Site(f"{block}.qkv", "weight", (24, 8), Layout("(h k) d", rows[p]), shapes[p]) for p in rows}


def transposed(block):
    columns = {"q": Window(1, 0, 12), "v": Window(1, 18, 24)}
    shapes = {"q": HEADS, "v": GROUPED}
    return {p: Site(f"{block}.qkv", "weight", (8, 24), Layout("d (h k)", columns[p]), shapes[p]) for p in columns}


def interleaved(block):
    rows = {"q": Window(0, 0, 3, blocks=4), "v": Window(0, 6, 9, blocks=4)}
    return {p: Site(f"{block}.qkv", "weight", (36, 8), Layout("(h k) d", rows[p]), HEADS) for p in rows}


def adapter_of(sites=split, *, layers=2, sharing="full", modules=None, scale=1.0):
    spec, draw, made = AdapterSpec(2, alpha=3.0, sharing=sharing), np.random.default_rng(0), {}
    for i in range(layers):
        layer = AdapterLayer(spec, sites(BLOCK.format(i)), {})
        shapes = param_shapes(spec, layer.shape)
        params = {key: np.float32(scale * draw.normal(size=shape)) for key, shape in shapes.items()}
        made[f"layers.{i}"] = AdapterLayer(spec, layer.sites, params)
    return Adapter(made, modules=modules or {})


def base_tensors(adapter, dtype=np.float32):
    """Random tensors for what an adapter changes, and some others."""
    draw = np.random.default_rng(1)
    shapes = {f"{s.module}.{s.parameter}": s.weight_shape for la in adapter.layers.values() for s in la.sites.values()}
    shapes |= {"model.embed_tokens.weight": (16, 8), "lm_head.weight": (16, 8), "model.norm.weight": (8,)}
    return {name: draw.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def save_base(directory, tensors, *, shards=2, **config):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"vocab_size": 16, "tie_word_embeddings": False, **config}))
    (directory / "tokenizer.json").write_text("tokens")
    (directory / "pytorch_model.bin").write_text("the same weights in another form")
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    places = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(places.values())):
        save_file({name: tensors[name] for name in places if places[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return directory


def stored(directory):
    files = sorted(directory.glob("*.safetensors"))
    return {tensor.name: tensor for file in files for tensor in decode(file.read_bytes(), file)}


def array(tensor: Stored):
    return np.frombuffer(tensor.data, DTYPES[tensor.dtype]).reshape(tensor.shape)


@pytest.mark.parametrize("sharing", ["full", "a", "b", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sites", [split, fused, transposed, interleaved])
def test_m4_every_sum_is_rounded_once(sites, dtype, sharing, tmp_path):
    if DTYPES[dtype] is None:
        pytest.skip("NumPy has bfloat16 through ml_dtypes alone")
    adapter = adapter_of(sites, sharing=sharing)
    base = base_tensors(adapter, DTYPES[dtype])
    changed = save_merged(adapter, save_base(tmp_path / "base", base), tmp_path / "out")
    exact = {name: value.astype(np.float64) for name, value in base.items()}
    for layer in adapter.layers.values():
        for p, delta in reference.delta(layer.spec, layer.shape, layer.params).items():
            site = layer.sites[p]
            name = f"{site.module}.{site.parameter}"
            exact[name] = reference.merge(exact[name], delta, site.layout)
    merged = stored(tmp_path / "out")
    assert set(changed) == {f"{s.module}.weight" for layer in adapter.layers.values() for s in layer.sites.values()}
    for name in changed:
        value = array(merged[name])
        ulp = np.maximum(EPS[dtype] * np.abs(exact[name]), 2.0**-24 if dtype == "F16" else 0.0)
        parts = np.abs(exact[name]) + np.abs(base[name].astype(np.float64))
        error = np.abs(value.astype(np.float64) - exact[name])
        assert (error <= ulp / 2 + 4 * EPS["F64" if dtype == "F64" else "F32"] * parts).all()


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_m4_every_other_byte_is_copied(shards, tmp_path):
    adapter = adapter_of()
    base = save_base(tmp_path / "base", base_tensors(adapter), shards=shards)
    changed = save_merged(adapter, base, tmp_path / "out")
    expected = sorted(path.name for path in base.iterdir() if path.name != "pytorch_model.bin")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == expected
    for name in expected:
        before, after = (base / name).read_bytes(), (tmp_path / "out" / name).read_bytes()
        assert len(before) == len(after)
        if not name.endswith(".safetensors"):
            assert before == after
            continue
        start = 8 + int.from_bytes(before[:8], "little")
        assert before[:start] == after[:start]
    before, after = stored(base), stored(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == set(changed)


@pytest.mark.parametrize(("prefix", "taken"), [("language.", ""), ("", "model."), ("a.b.", "model.layers.")])
def test_m4_one_prefix_is_added_to_all_paths_or_taken_from_all(prefix, taken, tmp_path):
    adapter = adapter_of(layers=1)
    plain = base_tensors(adapter)
    base = {prefix + name.removeprefix(taken): value for name, value in plain.items()}
    if prefix and taken:
        with pytest.raises(HoraError, match="got 0 that fit"):
            save_merged(adapter, save_base(tmp_path / "base", base), tmp_path / "out")
        return
    changed = save_merged(adapter, save_base(tmp_path / "base", base), tmp_path / "out")
    assert changed == [f"{prefix}{BLOCK.format(0)}.{p}.weight".replace(taken, "") for p in ("q_proj", "v_proj")]


def test_m4_paths_that_fit_twice_are_refused(tmp_path):
    adapter = adapter_of(layers=1)
    base = {f"{tower}.{name}": value for tower in ("text", "vision") for name, value in base_tensors(adapter).items()}
    with pytest.raises(HoraError, match="got 2 that fit and no model"):
        save_merged(adapter, save_base(tmp_path / "base", base), tmp_path / "out")


def test_m4_tensors_trained_whole_replace_those_of_the_checkpoint(tmp_path):
    head, bias = np.float32(np.arange(128).reshape(16, 8)), np.float32(np.arange(12))
    modules = {"lm_head.weight": head, f"{BLOCK.format(0)}.q_proj.base_layer.bias": bias}
    adapter = adapter_of(modules=modules)
    base = base_tensors(adapter, np.float16) | {f"{BLOCK.format(0)}.q_proj.bias": np.zeros(12, np.float16)}
    save_merged(adapter, save_base(tmp_path / "base", base), tmp_path / "out")
    merged = stored(tmp_path / "out")
    np.testing.assert_array_equal(array(merged["lm_head.weight"]), head.astype(np.float16))
    np.testing.assert_array_equal(array(merged[f"{BLOCK.format(0)}.q_proj.bias"]), bias.astype(np.float16))


def other_type(base):
    return base | {f"{BLOCK.format(0)}.q_proj.weight": np.zeros((12, 8), np.uint8)}


def without(base):
    return {name: value for name, value in base.items() if "layers.1.self_attn.v" not in name}


def large(base):
    return {name: np.full_like(value, 65_504.0) for name, value in base.items()}


HEAD = {"lm_head.weight": np.ones((16, 8), np.float32)}
REFUSED = {
    "quantised": ({}, None, {"quantization_config": {"quant_method": "gptq"}}, "got a gptq checkpoint: merge into"),
    "integers": ({}, other_type, {}, "16 bits or more, got U8 for model.layers.0.self_attn.q_proj.weight"),
    "absent": ({}, without, {}, "got 0 that fit and no model.layers.1.self_attn.v_proj.weight"),
    "another shape": ({"sites": lambda block: fused(block.replace("self_attn", "mlp"))}, None, {}, "no model.layers"),
    "overflow": ({"scale": 50.0}, large, {}, "leaves the range of F16"),
    "not finite": ({}, lambda base: {name: value * np.nan for name, value in base.items()}, {}, "base is not finite"),
    "tied by the config": ({"modules": HEAD}, None, {"tie_word_embeddings": True}, "lm_head.weight is tied"),
    "tied in a part of the config": (
        {"modules": HEAD},
        None,
        {"text_config": {"tie_word_embeddings": True}},
        "lm_head.weight is tied",
    ),
    "tied by what is stored": (
        {"modules": {"model.embed_tokens.weight": HEAD["lm_head.weight"]}},
        lambda base: {name: value for name, value in base.items() if name != "lm_head.weight"},
        {"tie_word_embeddings": None},
        "embed_tokens.weight is tied",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_m4_what_cannot_be_merged_is_refused_and_nothing_is_written(what, tmp_path):
    given, change, config, match = REFUSED[what]
    base = base_tensors(adapter_of(), np.float16)
    base = save_base(tmp_path / "base", change(base) if change else base, **config)
    if config.get("tie_word_embeddings", True) is None:
        (base / "config.json").write_text(json.dumps({"vocab_size": 16}))
    with pytest.raises(HoraError, match=match):
        save_merged(adapter_of(**given), base, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_m4_models_in_folders_are_named(tmp_path):
    (tmp_path / "snapshots").mkdir()
    save_base(tmp_path / "snapshots/abc", base_tensors(adapter_of()))
    with pytest.raises(HoraError, match=r"there are models in its folders snapshots.abc, name one of them"):
        save_merged(adapter_of(), tmp_path, tmp_path / "out")


def test_m4_a_base_with_an_adapter_in_its_directory_is_refused(tmp_path):
    base = save_base(tmp_path / "base", base_tensors(adapter_of()))
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(HoraError, match=r"without an adapter in its directory, got adapter_config\.json"):
        save_merged(adapter_of(), base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_m4_a_tensor_of_another_shape_is_refused(tmp_path):
    adapter = adapter_of()
    base = base_tensors(adapter)
    name = f"{BLOCK.format(1)}.v_proj.weight"
    save_base(tmp_path / "base", base | {name: base[name].T.copy()})
    with pytest.raises(HoraError, match=r"has shape \(6, 8\) in the adapter, got \(8, 6\)"):
        save_merged(adapter, tmp_path / "base", tmp_path / "out")


def truncate(base):
    path = next(base.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


def forget(base):
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"].popitem()
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def escape(base):
    index = {"weight_map": {"a": "../base/model-0.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGE = {
    "truncated": (truncate, "must be a whole safetensors file"),
    "a shard is absent": (lambda base: (base / "model-1.safetensors").unlink(), "is absent: download it again"),
    "no safetensors": (
        lambda base: (base / "model.safetensors.index.json").unlink(),
        "got neither in .*: save the model",
    ),
    "another index": (forget, "names the tensors of its files, got a difference in"),
    "an index that leads out": (escape, "names files beside it"),
    "an index without a map": (lambda base: (base / "model.safetensors.index.json").write_text("{}"), "maps tensors"),
    "an index that is no JSON": (lambda base: (base / "model.safetensors.index.json").write_text("{"), "must be JSON"),
    "a config that is no object": (lambda base: (base / "config.json").write_text("[]"), "must be a JSON object"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_m4_a_damaged_checkpoint_is_refused(what, tmp_path):
    damage, match = DAMAGE[what]
    base = save_base(tmp_path / "base", base_tensors(adapter_of()))
    damage(base)
    with pytest.raises(HoraError, match=match):
        save_merged(adapter_of(), base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_m4_a_model_of_diffusers_is_merged(tmp_path):
    base = save_base(tmp_path / "base", base_tensors(adapter_of()), shards=1)
    (base / "model.safetensors").rename(base / "diffusion_pytorch_model.safetensors")
    save_merged(adapter_of(), base, tmp_path / "out")
    assert stored(tmp_path / "out").keys() == stored(base).keys()
    assert (tmp_path / "out" / "diffusion_pytorch_model.safetensors").exists()


def test_m4_an_index_beside_one_whole_file_is_left_behind(tmp_path):
    """As transformers reads such a directory."""
    adapter = adapter_of()
    base = save_base(tmp_path / "base", base_tensors(adapter), shards=2)
    save_file(base_tensors(adapter), base / "model.safetensors")
    save_merged(adapter, base, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_m4_no_directory_is_no_checkpoint(tmp_path):
    with pytest.raises(HoraError, match="a checkpoint is a directory"):
        save_merged(adapter_of(), tmp_path / "absent", tmp_path / "out")


def test_m4_one_tensor_is_in_memory_at_a_time(tmp_path):
    shape = ProjectionShape(4, 64, 512)
    sites = lambda block: {"q": Site(f"{block}.q_proj", "weight", (256, 512), Layout(), shape)}  # noqa: E731
    adapter = adapter_of(sites, layers=12)
    base = save_base(tmp_path / "base", base_tensors(adapter, np.float16))
    one = 256 * 512 * 4  # bytes of one tensor in float32
    tracemalloc.start()
    save_merged(adapter, base, tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * one  # the tensor as it is stored and in float32, its delta, and what is written


def test_m4_progress_comes_to_all_bytes(tmp_path):
    base, calls = save_base(tmp_path / "base", base_tensors(adapter_of())), []
    save_merged(adapter_of(), base, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert {total for _, total in calls} == {size}
    done = [done for done, _ in calls]
    assert done[-1] == size
    assert all(a < b for a, b in itertools.pairwise(done))
