"""Export to LoRA: the same update, exactly, in a form that every LoRA loader reads."""

import json
import re

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
    portable,
    reference,
    to_lora,
)
from hora_spec.goldens import load_goldens
from hora_spec.goldens.stored import load_stored_goldens
from safetensors.numpy import load_file

GOLDENS, STORED = load_goldens(), load_stored_goldens()
HEADS = ProjectionShape(num_heads=4, head_dim=3, embed_dim=5)
GROUPED = ProjectionShape(num_heads=2, head_dim=3, embed_dim=5)

# Every place of q (12 rows of 5) and v (6 rows of 5), and the rows and columns it has in the (out, in) matrix.
PLACES = {
    "linear": {
        "q": (Site("a.q", "weight", (12, 5), Layout(), HEADS), slice(0, 12), slice(0, 5)),
        "v": (Site("a.v", "weight", (6, 5), Layout(), GROUPED), slice(0, 6), slice(0, 5)),
    },
    "conv1d": {"q": (Site("a.q", "weight", (5, 12), Layout("d (h k)"), HEADS), slice(0, 12), slice(0, 5))},
    "kernels": {
        "q": (Site("a.q", "kernel", (5, 4, 3), Layout("d h k"), HEADS), slice(0, 12), slice(0, 5)),
        "v": (Site("a.v", "kernel", (2, 5, 3), Layout("h d k"), GROUPED), slice(0, 6), slice(0, 5)),
    },
    "fused rows": {
        "q": (Site("a.qkv", "weight", (24, 5), Layout("(h k) d", Window(0, 0, 12)), HEADS), slice(0, 12), slice(0, 5)),
        "v": (Site("a.qkv", "weight", (24, 5), Layout("(h k) d", Window(0, 18, 24)), GROUPED), slice(18, 24), slice(5)),
    },
    "fused columns": {
        "q": (Site("c", "weight", (5, 24), Layout("d (h k)", Window(1, 0, 12)), HEADS), slice(0, 12), slice(0, 5)),
        "v": (Site("c", "weight", (5, 24), Layout("d (h k)", Window(1, 18, 24)), GROUPED), slice(18, 24), slice(5)),
    },
    "fused heads": {
        "q": (Site("a.q", "kernel", (8, 5, 3), Layout("h d k", Window(0, 0, 4)), HEADS), slice(0, 12), slice(0, 5)),
        "v": (Site("a.q", "kernel", (8, 5, 3), Layout("h d k", Window(0, 6, 8)), GROUPED), slice(18, 24), slice(0, 5)),
    },
    "part of the input": {
        "q": (Site("a.q", "weight", (12, 9), Layout("(h k) d", Window(1, 2, 7)), HEADS), slice(0, 12), slice(2, 7)),
    },
    "in_proj": {
        "q": (Site("a", "in_proj_weight", (24, 5), Layout("(h k) d", Window(0, 0, 12)), HEADS), slice(0, 12), slice(5)),
    },
}
SPECS = {
    "full": AdapterSpec(2, hidden_dim=3, head_embed_dim=4, alpha=3.0),
    "paper": AdapterSpec.paper(2),
    "residual": AdapterSpec(3, hidden_dim=3, head_embed_dim=4, residual=True),
    "a": AdapterSpec(2, sharing="a"),
    "b": AdapterSpec(2, hidden_dim=3, head_embed_dim=4, sharing="b", alpha=5.0),
    "none": AdapterSpec(2, sharing="none"),
}


def layer_of(spec, sites, seed=0):
    draw, layer = np.random.default_rng(seed), AdapterLayer(spec, sites, {})
    shapes = param_shapes(spec, layer.shape)
    return AdapterLayer(spec, sites, {key: np.float32(draw.normal(size=shape)) for key, shape in shapes.items()})


def adapter_of(*layers, **kwargs):
    return Adapter({f"layer.{i}": layer for i, layer in enumerate(layers)}, **kwargs)


def lora_delta(module):
    """What every LoRA implementation adds to the (out, in) matrix."""
    return module.alpha / module.rank * module.b @ module.a


@pytest.mark.parametrize("method", SPECS)
@pytest.mark.parametrize("place", PLACES)
def test_f6_the_export_is_the_delta(place, method):
    layer = layer_of(SPECS[method], {p: site for p, (site, _, _) in PLACES[place].items()})
    modules = to_lora(adapter_of(layer))
    expected = {path: np.zeros_like(lora_delta(module)) for path, module in modules.items()}
    for p, delta in reference.delta(layer.spec, layer.shape, layer.params).items():
        site, rows, columns = PLACES[place][p]
        expected[site.module][rows, columns] = delta
    for path, module in modules.items():
        scale = np.abs(expected[path]).max()
        np.testing.assert_allclose(lora_delta(module), expected[path], rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", GOLDENS)
def test_f6_the_export_of_every_golden_is_its_delta(name, fused):
    golden = GOLDENS[name]
    if fused and len({shape.embed_dim for shape in golden.layer.values()}) > 1:
        fused = False  # weights of different input width cannot be one
    stops = np.cumsum([shape.weight_shape[0] for shape in golden.layer.values()]).tolist()
    sites, rows = {}, {}
    for (p, shape), stop in zip(golden.layer.items(), stops, strict=True):
        start = stop - shape.weight_shape[0] if fused else 0
        rows[p] = slice(start, start + shape.weight_shape[0])
        layout = Layout(window=Window(0, start, stop)) if fused else Layout()
        weight_shape = (stops[-1], shape.embed_dim) if fused else shape.weight_shape
        sites[p] = Site("qkv" if fused else p, "weight", weight_shape, layout, shape)
    modules = to_lora(adapter_of(AdapterLayer(golden.spec, sites, golden.params)))
    for p, delta in golden.delta.items():
        module = modules[sites[p].module]
        scale = golden.spec.scaling * (np.abs(module.b) @ np.abs(module.a)).max()
        np.testing.assert_allclose(lora_delta(module)[rows[p]], delta, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("name", STORED)
def test_f6_the_export_of_every_stored_weight_fills_the_rows_of_its_projections(name):
    golden = STORED[name]
    if any(layout.stacked for layout in golden.layouts.values()):
        return  # files hold one layer at a time
    sites = {p: Site("a", "weight", golden.weight.shape, golden.layouts[p], golden.shapes[p]) for p in golden.layouts}
    layer = layer_of(AdapterSpec(2, alpha=3.0), sites)
    module = to_lora(adapter_of(layer))["a"]
    merged = np.zeros(golden.weight.shape)
    for p, delta in reference.delta(layer.spec, layer.shape, layer.params).items():
        merged = reference.merge(merged, delta, golden.layouts[p])
    whole = Layout(next(iter(golden.layouts.values())).pattern)
    np.testing.assert_allclose(lora_delta(module), whole.read(merged), rtol=0, atol=1e-12)


def test_f6_one_head_by_hand():
    site = Site("q", "weight", (2, 3), Layout(), ProjectionShape(1, 2, 3))
    a, b = np.float32([[1, 2, 3]]), np.float32([[[5], [7]]])
    layer = AdapterLayer(AdapterSpec(1, sharing="a", alpha=2.0), {"q": site}, {"a.q": a, "b.q": b})
    module = to_lora(adapter_of(layer))["q"]
    np.testing.assert_array_equal(module.a, [[1, 2, 3]])
    np.testing.assert_array_equal(module.b, [[5], [7]])
    assert (module.alpha, module.rank) == (2.0, 1)
    np.testing.assert_array_equal(lora_delta(module), [[10, 20, 30], [14, 28, 42]])


def test_f6_an_a_per_head_makes_b_block_diagonal():
    site = Site("q", "weight", (4, 2), Layout(), ProjectionShape(2, 2, 2))
    a = np.float32([[[1, 2]], [[3, 4]]])
    b = np.float32([[[5], [6]], [[7], [8]]])
    module = to_lora(adapter_of(AdapterLayer(AdapterSpec(1, sharing="none"), {"q": site}, {"a.q": a, "b.q": b})))["q"]
    np.testing.assert_array_equal(module.a, [[1, 2], [3, 4]])
    np.testing.assert_array_equal(module.b, [[5, 0], [6, 0], [0, 7], [0, 8]])
    assert module.rank == 2


def test_f6_ranks_of_a_fused_weight_add_up():
    sites = {p: site for p, (site, _, _) in PLACES["fused rows"].items()}
    module = to_lora(adapter_of(layer_of(AdapterSpec(2, alpha=3.0), sites)))["a.qkv"]
    assert (module.rank, module.alpha, module.b.shape) == (4, 6.0, (24, 4))
    assert not module.b[:12, 2:].any()
    assert not module.b[18:, :2].any()
    assert not module.b[12:18].any()


def test_f6_layers_of_different_scaling_share_a_module():
    q, v = (site for site, _, _ in PLACES["fused rows"].values())
    third = Site("a.other", "weight", (6, 5), Layout(), GROUPED)
    one, other = AdapterSpec(2, sharing="a", alpha=3.0), AdapterSpec(3, sharing="a", alpha=2.0)
    layers = layer_of(one, {"q": q}), layer_of(other, {"k": third, "v": v})
    module = to_lora(adapter_of(*layers))["a.qkv"]
    for site, layer, p in ((q, layers[0], "q"), (v, layers[1], "v")):
        delta = reference.delta(layer.spec, layer.shape, layer.params)[p]
        np.testing.assert_allclose(lora_delta(module)[site.layout.index(site.weight_shape)], delta, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", SPECS)
@pytest.mark.parametrize("place", PLACES)
def test_f6_the_portable_form_is_the_delta_whatever_a_reader_makes_of_patterns(place, method, tmp_path):
    sites = {p: site for p, (site, _, _) in PLACES[place].items()}
    other = {"o": Site("a.other", "weight", (6, 5), Layout(), GROUPED)}
    adapter = adapter_of(layer_of(SPECS[method], sites), layer_of(AdapterSpec(5, sharing="a", alpha=0.5), other, 1))
    export_lora(adapter, tmp_path, dtype=np.float64)
    config, tensors = exported(tmp_path)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert type(config["lora_alpha"]) is int
    assert config["lora_alpha"] == config["r"] == max(module.rank for module in to_lora(adapter).values())
    for path, module in to_lora(adapter).items():
        a, b = (tensors[f"base_model.model.{path}.lora_{factor}.weight"] for factor in "AB")
        assert len(a) == b.shape[1] == config["r"]
        expected = lora_delta(module)
        np.testing.assert_allclose(b @ a, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def exported(directory):
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, load_file(directory / "adapter_model.safetensors")


def test_f6_the_directory_is_a_lora_adapter(tmp_path):
    sites = {p: site for p, (site, _, _) in PLACES["linear"].items()}
    modules = {"head.weight": np.ones((2, 2), np.float16)}
    config = {"task_type": "SEQ_CLS", "base_model_name_or_path": "base", "modules_to_save": ["head"], "route": "auto"}
    adapter = adapter_of(layer_of(AdapterSpec(2, alpha=8.0), sites), config=config, modules=modules)
    export_lora(adapter, tmp_path / "new" / "lora")
    config, tensors = exported(tmp_path / "new" / "lora")
    assert config == {
        "alpha_pattern": {},
        "base_model_name_or_path": "base",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 2,
        "lora_dropout": 0.0,
        "modules_to_save": ["head"],
        "peft_type": "LORA",
        "r": 2,
        "rank_pattern": {},
        "target_modules": ["a.q", "a.v"],
        "task_type": "SEQ_CLS",
        "use_dora": False,
        "use_rslora": False,
    }
    assert {key: (value.shape, value.dtype.name) for key, value in tensors.items()} == {
        "base_model.model.a.q.lora_A.weight": ((2, 5), "float32"),
        "base_model.model.a.q.lora_B.weight": ((12, 2), "float32"),
        "base_model.model.a.v.lora_A.weight": ((2, 5), "float32"),
        "base_model.model.a.v.lora_B.weight": ((6, 2), "float32"),
        "base_model.model.head.weight": ((2, 2), "float16"),
    }


def test_f6_tensors_are_rounded_once(tmp_path):
    adapter = adapter_of(layer_of(SPECS["full"], {"q": PLACES["conv1d"]["q"][0]}))
    module = portable(to_lora(adapter))["a.q"]
    np.testing.assert_array_equal(module.b, to_lora(adapter)["a.q"].b * 1.5)  # the scaling, in float64
    for dtype in (np.float16, np.float32, np.float64):
        export_lora(adapter, tmp_path / np.dtype(dtype).name, dtype=dtype)
        config, tensors = exported(tmp_path / np.dtype(dtype).name)
        assert config["fan_in_fan_out"]
        key = "base_model.model.a.q.lora_B.weight"
        np.testing.assert_array_equal(tensors[key], module.b.astype(dtype), strict=True)


def test_f6_in_the_compact_form_other_ranks_and_alphas_become_patterns(tmp_path):
    layers = [
        layer_of(AdapterSpec(rank, alpha=alpha, sharing="a"), {"q": Site(path, "weight", (6, 5), Layout(), GROUPED)})
        for path, rank, alpha in (("m.1.q", 2, None), ("m.11.q", 5, None), ("x.m.1.q", 5, 2.5), ("m.2.q", 3, 5.0))
    ]
    export_lora(adapter_of(*layers), tmp_path, compact=True)
    config, _ = exported(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (5, 5)

    def value(pattern, path, default):  # how PEFT reads a pattern
        return next((v for key, v in config[pattern].items() if re.match(rf"(.*\.)?({key})$", path)), config[default])

    for path, rank, alpha in (("m.1.q", 2, 2), ("m.11.q", 5, 5), ("x.m.1.q", 5, 2.5), ("m.2.q", 3, 5)):
        assert value("rank_pattern", path, "r") == rank
        assert value("alpha_pattern", path, "lora_alpha") == alpha


def test_f6_multihead_attention_gets_an_out_proj_of_zero(tmp_path):
    export_lora(adapter_of(layer_of(SPECS["full"], {"q": PLACES["in_proj"]["q"][0]})), tmp_path)
    config, tensors = exported(tmp_path)
    assert config["target_modules"] == ["a"]
    assert tensors["base_model.model.a.lora_B.weight"].shape == (24, 2)
    for name, shape in (("A", (2, 5)), ("B", (5, 2))):
        zeros = tensors[f"base_model.model.a.base_layer.out_proj.lora_{name}.weight"]
        np.testing.assert_array_equal(zeros, np.zeros(shape))


@pytest.mark.parametrize(
    ("site", "match"),
    [
        (Site("a", "q_proj_weight", (12, 5), Layout(), HEADS), "got \\['q_proj_weight'\\] of a: merge"),
        (Site("a", "kernel", (2, 4, 5, 3), Layout("1 h d k", Window(0, 1, 2)), HEADS), "rows of a matrix"),
    ],
)
def test_f6_what_lora_cannot_express_is_refused(tmp_path, site, match):
    with pytest.raises(HoraError, match=match):
        export_lora(adapter_of(layer_of(SPECS["full"], {"q": site})), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_f6_factors_outside_the_dtype_are_refused(tmp_path):
    layer = layer_of(SPECS["a"], {"q": PLACES["linear"]["q"][0]})
    layer.params["b.q"][:] = 1e6
    with pytest.raises(HoraError, match="overflow float16: export in a wider dtype"):
        export_lora(adapter_of(layer), tmp_path / "new", dtype=np.float16)
    layer.params["b.q"][:] = 1e-7  # a subnormal float16 has few digits
    with pytest.raises(HoraError, match="too small for float16: export in a wider dtype"):
        export_lora(adapter_of(layer), tmp_path / "new", dtype=np.float16)
    with pytest.raises(HoraError, match="float16, float32 or float64, got int32"):
        export_lora(adapter_of(layer), tmp_path / "new", dtype=np.int32)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", ["{}", '{"peft_type": "LORA"}', '{"peft_type": "HORA"}'])
def test_f6_nothing_is_ever_overwritten(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(HoraError, match="holds something"):
        export_lora(adapter_of(layer_of(SPECS["a"], {"q": PLACES["linear"]["q"][0]})), tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == [content]


def test_f6_a_bad_adapter_is_refused():
    layer = layer_of(SPECS["a"], {"q": PLACES["linear"]["q"][0]})
    layer.params["b.q"][0, 0, 0] = np.inf
    with pytest.raises(HoraError, match="finite"):
        to_lora(adapter_of(layer))
