"""Adapters on disk: what a directory holds, how it is replaced, and what is refused."""

import contextlib
import dataclasses
import hashlib
import json
import struct

import numpy as np
import pytest
from hora_spec import (
    Adapter,
    AdapterLayer,
    AdapterSpec,
    HoraError,
    LayerShape,
    Layout,
    ProjectionShape,
    Site,
    Window,
    layer_from_json,
    layer_to_json,
    load_adapter,
    param_shapes,
    save_adapter,
)
from hora_spec.goldens.stored import load_stored_goldens
from safetensors.numpy import load_file, save_file

STORED = load_stored_goldens()
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


@pytest.fixture
def undigested(saved):
    """As from a writer that knows no digests."""
    edit(saved, lambda config: [config.pop(key) for key in DIGESTS])
    return saved


DIGESTS = ("hora_layers_sha256", "hora_tensors_sha256")


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


def test_f1_bfloat16_of_whole_modules_is_read_exactly(undigested):
    key, values = b"base_model.model.score.weight", np.array([1.5, -2.0, 3.140625], np.float32)
    bits = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    tensors = {k: v for k, v in load_file(undigested / TENSORS).items() if k.encode() != key}
    header, data = {key.decode(): {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}, bits
    for name, value in tensors.items():
        dtype = {"float32": "F32", "int64": "I64"}[value.dtype.name]
        offsets = [len(data), len(data) + value.nbytes]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": offsets}
        data += value.tobytes()
    text = json.dumps(header).encode()
    (undigested / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data)
    np.testing.assert_array_equal(load_adapter(undigested).modules["score.weight"], values, strict=True)


def test_f2_the_config_describes_every_layer(saved):
    entry = json.loads((saved / CONFIG).read_text())["hora_layers"][2]
    assert entry == {
        "name": "h.0.attn",
        "spec": AdapterSpec.paper(2).to_dict(),
        "leader": "h.0.attn.c_attn",
        "projections": {
            p: {
                "module": "h.0.attn.c_attn",
                "parameter": "weight",
                "num_heads": 2,
                "head_dim": 2,
                "embed_dim": 4,
                "weight_shape": [4, 12],
                "layout": {"pattern": "d (h k)", "window": [1, start, start + 4]},
            }
            for p, start in (("q", 0), ("v", 8))
        },
    }
    assert layer_to_json(*layer_from_json(entry)) == entry


@pytest.mark.parametrize("name", [name for name, golden in STORED.items() if golden.weight.ndim == 2])
def test_f2_every_stored_form_survives_a_file(tmp_path, name):
    golden = STORED[name]
    sites = {p: Site("a", "weight", golden.weight.shape, golden.layouts[p], golden.shapes[p]) for p in golden.layouts}
    spec = AdapterSpec(2)
    shapes = param_shapes(spec, LayerShape({p: site.projection for p, site in sites.items()}))
    params = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    save_adapter(tmp_path / "a", Adapter({"a": AdapterLayer(spec, sites, params)}))
    assert load_adapter(tmp_path / "a").layers["a"].sites == sites


def test_f2_a_window_of_one_block_is_written_as_the_first_readers_expect():
    shape = ProjectionShape(2, 2, 4)
    for blocks, window in ((1, [0, 0, 4]), (2, [0, 0, 2, 2])):
        site = Site("a", "weight", (12, 4), Layout(window=Window(*window[:3], blocks)), shape)
        entry = layer_to_json("a", AdapterSpec(2), {"q": site})
        assert entry["projections"]["q"]["layout"]["window"] == window
        assert layer_from_json(entry)[2] == {"q": site}


def test_f2_the_first_module_of_the_model_leads(saved):
    for name in ("model.layers.0.attn", "model.layers.1.attn"):
        assert load_adapter(saved).layers[name].leader == f"{name}.q_proj"
        assert sorted(load_adapter(saved).layers[name].sites) == ["k", "q"]


def layer(config, index=0):
    return config["hora_layers"][index]


def q(config, index=0):
    return layer(config, index)["projections"]["q"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(peft_type="LORA"), "peft_type 'HORA', got 'LORA'"),
        (lambda c: c.pop("hora_layers"), "hora_layers"),
        (lambda c: c.update(hora_layers={}), "list of layers, got dict"),
        (lambda c: c.update(hora_layers=[]), "of different adapters"),
        (lambda c: c.update(hora_layers=[3]), "JSON object, got 3"),
        (lambda c: layer(c).update(name=["x"]), "a layer has a name"),
        (lambda c: layer(c).update(name=""), "non-empty string"),
        (lambda c: layer(c).update(name="\udc00"), "non-empty string"),
        (lambda c: layer(c).update(name="h.0.attn"), "unique, got 'h.0.attn' twice"),
        (lambda c: layer(c).update(leader="model.layers.1.attn.q_proj"), "one of its modules"),
        (lambda c: layer(c).update(projections=[]), "maps projections"),
        (lambda c: layer(c).update(projections={}), "one of its modules"),
        (lambda c: layer(c)["projections"].update({"../k": layer(c)["projections"].pop("k")}), "projection name"),
        (lambda c: q(c).update(module="../outside"), r"dotted path.*'\.\./outside'"),
        (lambda c: q(c).update(module="/etc/passwd"), "dotted path"),
        (lambda c: q(c).update(module="a\\b"), "dotted path"),
        (lambda c: q(c).update(module="a..b"), "dotted path"),
        (lambda c: q(c).update(module="a b"), "dotted path"),
        (lambda c: q(c).update(module=""), "dotted path"),
        (lambda c: q(c).update(module="a.\ud800"), "dotted path"),
        (lambda c: q(c).update(parameter="weight\0"), "a letter first"),
        (lambda c: q(c).update(parameter="__class__"), "a letter first"),
        (lambda c: q(c).update(parameter="a.weight"), "a letter first"),
        (lambda c: q(c).update(parameter=None), "a letter first"),
        (lambda c: q(c).update(weight_shape=[12, 8.0]), "integers"),
        (lambda c: q(c).update(weight_shape=[8, 12]), r"needs shape \(12, 8\), got \(8, 12\)"),
        (lambda c: q(c).update(num_heads=3), r"needs shape \(9, 8\)"),
        (lambda c: q(c)["layout"].update(pattern="h w"), "a pattern names"),
        (lambda c: q(c)["layout"].update(pattern=None), "a pattern is a string"),
        (lambda c: q(c)["layout"].update(window=[0, 4]), "3 or 4 integers"),
        (lambda c: q(c)["layout"].update(window=[0, 4, 2]), "start < stop"),
        (lambda c: q(c)["layout"].update(window=[0, 0, 2, 0]), "blocks >= 1"),
        (lambda c: q(c)["layout"].update(window=[0, 0, 2, 2, 2]), "3 or 4 integers"),
        (lambda c: q(c, 2)["layout"].update(window=[1, 6, 10]), "adapted once"),
        (lambda c: q(c, 2).update(weight_shape=[4, 16]), "one shape"),
        (lambda c: q(c).update(weight_shape=[1, 12, 8], layout={"pattern": "l (h k) d", "window": None}), "stacked"),
    ],
)
def test_f2_a_layer_table_that_makes_no_sense_is_refused(undigested, change, match):
    edit(undigested, change)
    refused(undigested, match)


def test_f2_two_layers_of_one_leader_are_refused(tmp_path):
    spec, (_, _, sites) = AdapterSpec(2), fused(0, SPEC)
    layers = filled("one", spec, {"q": sites["q"]}) | filled("other", spec, {"v": sites["v"]})
    with pytest.raises(HoraError, match=r"got h\.0\.attn\.c_attn for 'one' and 'other'"):
        save_adapter(tmp_path / "new", Adapter(layers))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(hora_spec_version=2), "spec version 1, got 2"),
        (lambda c: c.update(hora_spec_version=True), "spec version 1, got True"),
        (lambda c: c.update(hora_spec_version="1"), "spec version 1, got '1'"),
        (lambda c: c.pop("hora_spec_version"), "hora_spec_version"),
        (lambda c: layer(c).update(colour="red"), r"unknown \['colour'\]"),
        (lambda c: layer(c)["spec"].update(colour="red"), r"unknown \['colour'\]"),
        (lambda c: layer(c)["spec"].pop("alpha"), r"missing \['alpha'\]"),
        (lambda c: q(c).pop("layout"), r"missing \['layout'\]"),
        (lambda c: q(c)["layout"].pop("window"), r"missing \['window'\]"),
    ],
)
def test_f4_other_versions_and_fields_are_refused(undigested, change, match):
    edit(undigested, change)
    refused(undigested, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(A_Q), r"missing \['a.q'\]"),
        (lambda t: t.update({A_Q + "2": t[A_Q]}), r"extra \['a.q2'\]"),
        (lambda t: t.update({A_Q: t[A_Q].T}), r"shape \(2, 8\), got \(8, 2\): transpose"),
        (lambda t: t.update({A_Q: t[A_Q].astype(np.float64)}), "float32, got float64"),
        (lambda t: t.update({A_Q: t[A_Q].astype(np.float16)}), "float32, got float16"),
        (lambda t: t.update({A_Q: t[A_Q].astype(np.int32)}), "floating, got int32"),
        (lambda t: t.update({A_Q: t[A_Q].view(np.int32)}), "floating, got int32"),
        (lambda t: t.update({A_Q: t[A_Q].view(np.uint32)}), "floating, got uint32"),
        (lambda t: t[A_Q].fill(np.nan), "finite"),
        (lambda t: t["base_model.model.score.weight"].fill(np.nan), "NaN in score.weight"),
        (lambda t: t[A_Q].fill(-np.inf), "finite"),
        (lambda t: t.update({A_Q.replace(".0.", ".7."): t[A_Q]}), "different adapters"),
        (lambda t: t.update({"score.weight": t[A_Q]}), "different adapters"),
        (lambda t: t.update({"base_model.model./etc": t[A_Q]}), "dotted path"),
    ],
)
def test_f5_tensors_that_do_not_fit_are_refused(undigested, change, match):
    tensors = load_file(undigested / TENSORS)
    change(tensors)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, undigested / TENSORS)
    refused(undigested, match)


A_Q = "base_model.model.model.layers.0.attn.q_proj.hora_hyper.a.q"


def test_f5_a_pair_from_two_adapters_is_refused(undigested, tmp_path):
    other = example()
    layers = other.layers | filled(*separate(1, SPEC.replace(rank=4)))
    save_adapter(tmp_path / "other", Adapter(layers))
    (undigested / TENSORS).write_bytes((tmp_path / "other" / TENSORS).read_bytes())
    refused(undigested, r"layer 'model.layers.1.attn': .* must have shape")


def test_f5_a_truncated_file_is_refused(saved):
    data, text = (saved / TENSORS).read_bytes(), (saved / CONFIG).read_bytes()
    for size in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        (saved / TENSORS).write_bytes(data[:size])
        refused(saved, "truncated or damaged")
    (saved / TENSORS).write_bytes(data + b"0")
    refused(saved, "truncated or damaged")
    (saved / TENSORS).write_bytes(data)
    for size in (0, 1, len(text) // 2, len(text) - 1):
        (saved / CONFIG).write_bytes(text[:size])
        refused(saved, "must be JSON")


@pytest.mark.parametrize("text", [b"\xff", b"[" * 100_000, b"[1]", b"3", b'"HORA"'])
def test_f5_a_config_that_is_no_json_object_is_refused(saved, text):
    (saved / CONFIG).write_bytes(text)
    refused(saved, "must be (a )?JSON")


def test_f5_a_header_that_lies_about_sizes_is_refused(saved):
    data = (saved / TENSORS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    for old, new in ((b'"shape":[2,8]', b'"shape":[9,8]'), (b'"dtype":"F32"', b'"dtype":"F64"')):
        (saved / TENSORS).write_bytes(data[: size + 8].replace(old, new) + data[size + 8 :])
        refused(saved, "truncated or damaged")
    for lie in (0, size - 1, 2**40, 2**64 - 1):
        (saved / TENSORS).write_bytes(struct.pack("<Q", lie) + data[8:])
        refused(saved, "truncated or damaged")


def test_f5_no_damaged_header_gets_past_the_checks(undigested):
    data = (undigested / TENSORS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    for i in range(0, 8 + size, 31):
        for byte in b'\0"9':
            (undigested / TENSORS).write_bytes(data[:i] + bytes([byte]) + data[i + 1 :])
            with contextlib.suppress(HoraError):
                load_adapter(undigested)


def test_f5_dtypes_that_numpy_lacks_are_refused(undigested):
    data = (undigested / TENSORS).read_bytes().replace(b'"I64"', b'"C64"')
    (undigested / TENSORS).write_bytes(data)
    refused(undigested, "got C64 for base_model.model.norm.count")


def test_f5_no_junk_in_the_layer_table_gets_past_the_checks(undigested):
    original = (undigested / CONFIG).read_text()
    accepted = set()
    for path in paths(json.loads(original)["hora_layers"][:1]):
        for junk in (None, [], {}, True, -1, 2, 1.5, "x", [[]], 10**400):
            config = json.loads(original)
            *parents, last = ("hora_layers", *path)
            node = config
            for key in parents:
                node = node[key]
            node[last] = junk
            (undigested / CONFIG).write_text(json.dumps(config))
            try:
                load_adapter(undigested)
            except HoraError:
                continue
            accepted.add(path[-1])
    # what the tensors cannot contradict, or what was there before
    names = {"name", "module", "parameter", "window", "rank", "num_heads"}
    assert accepted <= names | {"alpha", "gain", "normalize", "residual"}


def paths(node, prefix=()):
    """Every place in a JSON document."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))


def test_f7_both_digests_are_those_of_the_text(saved):
    config, tensors = json.loads((saved / CONFIG).read_text()), load_file(saved / TENSORS)
    assert {config[key] for key in DIGESTS} == {layers_by_hand(config), tensors_by_hand(tensors)}
    assert config["hora_tensors_sha256"] == tensors_by_hand(tensors)


def layers_by_hand(config):
    text = json.dumps(config["hora_layers"], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def tensors_by_hand(tensors):
    names = {"float32": "F32", "float16": "F16", "int64": "I64"}
    stream = b""
    for name in sorted(tensors):
        shape = ",".join(map(str, tensors[name].shape))
        stream += f'["{name}","{names[str(tensors[name].dtype)]}",[{shape}]]\n'.encode() + tensors[name].tobytes()
    return hashlib.sha256(stream).hexdigest()


@pytest.mark.parametrize("torn", [CONFIG, TENSORS])
def test_f7_a_torn_pair_of_equal_shapes_is_refused(saved, tmp_path, torn):
    save_adapter(tmp_path / "other", example(seed=7))
    (saved / torn).write_bytes((tmp_path / "other" / torn).read_bytes())
    refused(saved, "a save was interrupted")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: layer(c)["spec"].update(alpha=5.0),
        lambda c: layer(c)["spec"].update(activation="relu"),
        lambda c: q(c).update(num_heads=2, head_dim=6),
        lambda c: q(c).update(parameter="kernel"),
        lambda c: q(c).update(weight_shape=[8, 12], layout={"pattern": "d (h k)", "window": None}),
        lambda c: c["hora_layers"].reverse(),
    ],
)
def test_f7_a_changed_layer_table_is_refused(saved, change):
    edit(saved, change)
    refused(saved, "hora_layers_sha256")


def test_f7_a_value_that_changed_is_refused(saved):
    data = bytearray((saved / TENSORS).read_bytes())
    data[-1] ^= 1
    (saved / TENSORS).write_bytes(data)
    refused(saved, "hora_tensors_sha256")


@pytest.mark.parametrize("junk", ["", "x", 3, True, [], {}])
@pytest.mark.parametrize("key", DIGESTS)
def test_f7_a_digest_that_is_none_is_refused(saved, key, junk):
    edit(saved, lambda config: config.update({key: junk}))
    refused(saved, key)


@pytest.mark.parametrize("key", DIGESTS)
def test_f7_absent_digests_are_not_missed(saved, key):
    edit(saved, lambda config: config.pop(key))
    assert_equal(load_adapter(saved), example())
    edit(saved, lambda config: config.update({key: None}))
    assert_equal(load_adapter(saved), example())


def test_f7_the_digest_ignores_order_and_metadata_of_the_file(saved):
    tensors = load_file(saved / TENSORS)
    text = b'{"__metadata__": {"by": "me", "a": "b"}'
    start = 0
    for name, array in reversed(tensors.items()):
        dtype = {"float32": "F32", "float16": "F16", "int64": "I64"}[str(array.dtype)]
        offsets = [start, start := start + array.nbytes]
        text += f', "{name}": {json.dumps({"dtype": dtype, "shape": array.shape, "data_offsets": offsets})}'.encode()
    text += b"}"
    body = b"".join(array.tobytes() for array in reversed(tensors.values()))
    (saved / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + body)
    assert_equal(load_adapter(saved), example())


def test_f7_digests_belong_to_the_files_alone(saved, tmp_path):
    adapter = load_adapter(saved)
    assert not adapter.config.keys() & set(DIGESTS)
    save_adapter(tmp_path / "other", dataclasses.replace(adapter, config=dict.fromkeys(DIGESTS, "stale")))
    load_adapter(tmp_path / "other")


def test_f1_absent_files_are_named(saved):
    refused(saved / "no" / "where", "is none")
    refused(saved / CONFIG, "is none")
    for name in (TENSORS, CONFIG):
        data = (saved / name).read_bytes()
        (saved / name).unlink()
        refused(saved, f"lacks {name}")
        (saved / name).write_bytes(data)


def test_f1_a_config_that_is_not_json_is_not_written(tmp_path):
    with pytest.raises(HoraError, match="JSON values"):
        save_adapter(tmp_path / "new", example(target_modules={"q", "v"}))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: {"layers": {}}, "at least one layer"),
        (lambda a: {"layers": {"": next(iter(a.layers.values()))}}, "non-empty string"),
        (lambda a: {"modules": {"../x": np.zeros(1)}}, "dotted path"),
        (lambda a: {"modules": {"a.hora_hyper.b_in": np.zeros(1)}}, "belong to a layer"),
        (lambda a: {"modules": {"a.weight": np.full(2, np.nan)}}, "NaN in a.weight"),
        (lambda a: {"modules": {"a.weight": np.array(["x"])}}, "arrays of numbers"),
        (lambda a: {"layers": with_params(a, lambda x: x.astype(np.float64))}, "float32, got float64"),
        (lambda a: {"layers": with_params(a, lambda x: x * np.float32(np.nan))}, "finite"),
        (lambda a: {"layers": with_params(a, lambda x: x[..., None])}, "must have shape"),
    ],
)
def test_f5_a_bad_adapter_is_not_written(saved, change, match):
    before, bad = content(saved), dataclasses.replace(example(), **change(example()))
    for directory in (saved, saved.parent / "new"):
        with pytest.raises(HoraError, match=match):
            save_adapter(directory, bad)
    assert content(saved) == before
    assert not (saved.parent / "new").exists()


def with_params(adapter, change):
    return {
        name: dataclasses.replace(layer, params={key: change(value) for key, value in layer.params.items()})
        for name, layer in adapter.layers.items()
    }
