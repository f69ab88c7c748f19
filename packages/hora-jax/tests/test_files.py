"""The PEFT directory and LoRA export: exchange, refusals, and training state in Orbax."""

import inspect
import json

import hora_jax
import hora_spec
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hora_jax import (
    Target,
    export_lora,
    from_adapter,
    init,
    load_adapter,
    load_specs,
    make_plan,
    plan_from,
    presets,
    save_adapter,
    to_adapter,
)
from hora_jax.nnx import HoraModel, HoraParam
from hora_spec import AdapterSpec, HoraError, Layout, Window
from safetensors.numpy import load_file


@pytest.fixture
def llama(make_llama):
    return make_llama(num_hidden_layers=3)


@pytest.fixture
def planned(llama, method):
    return make_plan(llama, method, presets.llama())


@pytest.fixture
def phi(planned, perturbed):
    return perturbed(init(planned))


def equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_an_adapter_comes_back_as_it_was(tmp_path, planned, phi):
    save_adapter(tmp_path, planned, phi, config={"base_model_name_or_path": "a/b"})
    equal(load_adapter(tmp_path, planned), phi)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "a/b"


def test_f2_tensors_carry_the_names_they_have_in_pytorch(tmp_path, planned, phi):
    save_adapter(tmp_path, planned, phi)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.2.self_attn.q_proj.hora_hyper.b_out.v"
    np.testing.assert_array_equal(tensors[key], phi["model.layers.0.self_attn"]["b_out.v"][2])


def test_stacking_does_not_change_the_file(tmp_path, make_llama, planned, phi, method):
    scanned = make_plan(make_llama(num_hidden_layers=3, scan_layers=True), method, presets.llama())
    save_adapter(tmp_path / "a", planned, phi)
    save_adapter(tmp_path / "b", scanned, {"model.layers.*.self_attn": phi["model.layers.0.self_attn"]})
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    (params,) = load_adapter(tmp_path / "a", scanned).values()
    equal(params, phi["model.layers.0.self_attn"])


@pytest.mark.parametrize("scan", [False, True])
def test_parts_of_a_fused_weight_are_rows_of_the_pytorch_weight(make_vit, method, scan):
    planned = make_plan(make_vit(scan_layers=scan), method, presets.vit())
    sites = to_adapter(planned, init(planned)).layers["blocks.1.attn"].sites
    assert {site.module for site in sites.values()} == {"blocks.1.attn.qkv"}
    assert sites["v"].layout == Layout("(h k) d", Window(0, 32, 48))
    assert sites["v"].weight_shape == (48, 16)


ROWS = {
    "part of each head": (Layout("d h k", Window(2, 3, 5)), (8, 2, 5), Window(0, 3, 5, 2)),
    "some of the heads": (Layout("d h k", Window(1, 1, 3)), (8, 4, 2), Window(0, 2, 6)),
    "heads in groups": (Layout("d g h k"), (8, 2, 1, 2), None),
    "a group of heads": (Layout("d g h k", Window(1, 1, 2)), (8, 3, 2, 2), Window(0, 4, 8)),
    "heads of each group": (Layout("d g h k", Window(2, 1, 2)), (8, 2, 3, 2), Window(0, 2, 4, 2)),
    "columns by head": (Layout("d (h k)", Window(1, 2, 4, 2)), (8, 12), Window(0, 2, 4, 2)),
}


@pytest.mark.parametrize("name", ROWS)
def test_f2_a_leaf_in_any_layout_is_rows_of_the_pytorch_weight(tmp_path, name):
    layout, shape, window = ROWS[name]
    tree = {"attn": {"map": {"kernel": np.ones(shape, np.float32)}}}
    planned = make_plan(
        tree, AdapterSpec(2, hidden_dim=3, head_embed_dim=4), Target("attn.map.kernel", "q", layout, heads=2)
    )
    phi = hora_jax.init(planned)
    phi["attn"]["b_out.q"] += 1
    save_adapter(tmp_path, planned, phi)
    (site,) = hora_spec.load_adapter(tmp_path).layers["attn"].sites.values()
    assert site.layout == Layout("(h k) d", window)
    merged = hora_jax.merge(planned, tree, phi)["attn"]["map"]["kernel"]
    delta = hora_jax.delta(planned, phi)["attn"]["q"]
    in_torch = hora_spec.reference.merge(np.ones(site.weight_shape), np.asarray(delta), site.layout)
    np.testing.assert_allclose(Layout(layout.pattern).read(np.asarray(merged)), in_torch, rtol=1e-6)


def test_the_method_of_a_file_plans_the_model(tmp_path, llama, planned, phi, method):
    save_adapter(tmp_path, planned, phi)
    assert make_plan(llama, load_specs(tmp_path), presets.llama()) == planned
    other = make_plan(llama, method.replace(rank=2), presets.llama())
    with pytest.raises(HoraError, match="load_specs"):
        load_adapter(tmp_path, other)


def test_an_adapter_of_another_model_is_refused(tmp_path, make_vit, planned, phi, method):
    save_adapter(tmp_path, planned, phi)
    vit = make_plan(make_vit(), method, presets.vit())
    with pytest.raises(HoraError, match="of another model"):
        load_adapter(tmp_path, vit)


def test_modules_trained_whole_are_not_dropped_silently(tmp_path, planned, phi):
    save_adapter(tmp_path, planned, phi, modules={"score.weight": np.ones((2, 3), "float32")})
    with pytest.raises(HoraError, match="skip_modules=True"):
        load_adapter(tmp_path, planned)
    equal(load_adapter(tmp_path, planned, skip_modules=True), phi)


def test_s7_a_diverged_adapter_is_not_written(tmp_path, planned, phi):
    with pytest.raises(HoraError, match="finite"):
        save_adapter(tmp_path / "new", planned, jax.tree.map(lambda v: v * np.nan, phi))
    assert not (tmp_path / "new").exists()


def test_f6_the_exported_lora_is_the_delta(tmp_path, llama, planned, phi):
    export_lora(planned, phi, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_{}.weight"
    update = config["lora_alpha"] / config["r"] * tensors[key.format("B")] @ tensors[key.format("A")]
    merged = HoraModel(llama, planned, phi).merged()
    before, after = (m.model.layers[1].self_attn.v_proj.kernel[...] for m in (llama, merged))
    np.testing.assert_allclose(after - before, update.T, atol=1e-5)


def test_adapters_pass_through_the_specification_s_form(planned, phi):
    equal(from_adapter(planned, to_adapter(planned, phi)), phi)
    assert isinstance(to_adapter(planned, phi), hora_spec.Adapter)


def test_orbax_keeps_the_training_state_and_only_that(tmp_path, llama, planned, phi):
    model = HoraModel(llama, planned, phi)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=HoraParam)
    tokens = np.arange(8).reshape(2, 4)

    def train(model, optimizer):
        grads = nnx.grad(lambda m: (m(tokens) ** 2).mean(), argnums=nnx.DiffState(0, HoraParam))(model)
        optimizer.update(model, grads)

    train(model, optimizer)
    saved = {
        "adapter": nnx.to_pure_dict(nnx.state(model, HoraParam)),
        "optimizer": nnx.to_pure_dict(nnx.state(optimizer)),
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step", jax.tree.map(np.zeros_like, saved))
    equal(restored, saved)
    values = sum(leaf.size for leaf in jax.tree.leaves(saved["adapter"]))
    assert values == planned.params_count

    again = HoraModel(llama, planned, init(planned, seed=3))
    optimizer_again = nnx.Optimizer(again, optax.adam(1e-2), wrt=HoraParam)
    for part, key in ((again, "adapter"), (optimizer_again, "optimizer")):
        kept = nnx.state(part, HoraParam) if key == "adapter" else nnx.state(part)
        nnx.replace_by_pure_dict(kept, restored[key])
        nnx.update(part, kept)
    for each in ((model, optimizer), (again, optimizer_again)):
        train(*each)
    equal(again.adapter(), model.adapter())


def test_sixteen_bit_adapters_are_saved_exactly_as_float32(tmp_path, planned):
    phi = init(planned, seed=3, dtype="bfloat16")
    save_adapter(tmp_path, planned, phi)
    for key, params in load_adapter(tmp_path, planned).items():
        for name, value in params.items():
            assert value.dtype == "float32"
            np.testing.assert_array_equal(value, phi[key][name].astype("float32"))


@pytest.mark.parametrize("scan", [False, True])
def test_a_file_and_a_tree_make_the_plan(tmp_path, make_llama, planned, phi, scan):
    save_adapter(tmp_path, planned, phi)
    base = make_llama(num_hidden_layers=3, scan_layers=scan)
    found = plan_from(tmp_path, base, presets.llama("qkv"))
    assert [name for layer in found.layers for name in layer.names] == [x.name for x in planned.layers]
    values = load_adapter(tmp_path, found)
    assert found == planned or scan
    equal(list(values.values()), list(phi.values()))


def test_a_file_that_does_not_fit_the_tree_makes_no_plan(tmp_path, make_llama, planned, phi):
    save_adapter(tmp_path, planned, phi)
    with pytest.raises(HoraError, match="missing"):
        plan_from(tmp_path, make_llama(num_hidden_layers=2), presets.llama())
    with pytest.raises(HoraError, match="has"):
        plan_from(tmp_path, make_llama(num_hidden_layers=3, num_key_value_heads=4), presets.llama())


@pytest.fixture
def uneven(llama, method):
    """Layers of two ranks, and their adapter."""
    ranks = {0: 4, 1: 2, 2: 4}
    specs = {f"model.layers.{i}.self_attn": method.replace(rank=rank) for i, rank in ranks.items()}
    planned = make_plan(llama, specs, presets.llama())
    return planned, init(planned)


def test_a_file_with_a_method_for_each_layer_makes_the_plan(tmp_path, llama, uneven):
    save_adapter(tmp_path, *uneven)
    assert plan_from(tmp_path, llama, presets.llama()) == uneven[0]


def test_layers_of_a_stack_that_a_file_adapts_in_part_or_differently_make_no_plan(tmp_path, make_llama, uneven, method):
    scanned = make_llama(num_hidden_layers=3, scan_layers=True)
    save_adapter(tmp_path / "uneven", *uneven)
    with pytest.raises(HoraError, match=r"with \[\] missing there and 2 methods: unstack"):
        plan_from(tmp_path / "uneven", scanned, presets.llama())
    part = make_plan(make_llama(num_hidden_layers=2), method, presets.llama())
    save_adapter(tmp_path / "part", part, init(part))
    with pytest.raises(HoraError, match=r"with \['model\.layers\.2\.self_attn'\] missing there and 1 methods: unstack"):
        plan_from(tmp_path / "part", scanned, presets.llama())


def test_what_is_no_adapter_config_or_module_is_refused(tmp_path, planned, phi):
    for name in ("config", "modules"):
        for write in (save_adapter, export_lora):
            args = (tmp_path, planned, phi) if write is save_adapter else (planned, phi, tmp_path)
            with pytest.raises(HoraError, match=f"{name} is a mapping by name, got 3"):
                write(*args, **{name: 3})
    with pytest.raises(HoraError, match="spec S6"):
        to_adapter(planned, {**phi, "model.layers.0.self_attn": {"b_out.q": np.ones(3)}})
    with pytest.raises(HoraError, match=r"what hora_spec\.load_adapter returns, got 3"):
        from_adapter(planned, 3)
    assert not list(tmp_path.iterdir())


def test_f6_every_option_of_the_export_is_hora_spec_s(tmp_path, uneven):
    options = {"dtype", "compact", "for_server"}
    ours, theirs = (inspect.signature(fn).parameters for fn in (export_lora, hora_spec.export_lora))
    assert {name: ours[name].default for name in options} == {name: theirs[name].default for name in options}
    module = {"score.weight": np.ones((2, 3), "float32")}
    export_lora(*uneven, tmp_path / "a", config={"base_model_name_or_path": "a/b"}, modules=module, dtype=np.float16)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert config["base_model_name_or_path"] == "a/b"
    assert not config.get("rank_pattern")
    np.testing.assert_array_equal(tensors.pop("base_model.model.score.weight"), module["score.weight"])
    assert {value.dtype.name for value in tensors.values()} == {"float16"}
    export_lora(*uneven, tmp_path / "b", compact=True)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["rank_pattern"]
    with pytest.raises(HoraError, match="no such server"):
        export_lora(*uneven, tmp_path / "c", for_server="no such server")


def test_modules_trained_whole_are_not_dropped_from_an_adapter_in_memory(planned, phi):
    adapter = to_adapter(planned, phi, modules={"score.weight": np.ones((2, 3), "float32")})
    with pytest.raises(HoraError, match="skip_modules=True"):
        from_adapter(planned, adapter)
