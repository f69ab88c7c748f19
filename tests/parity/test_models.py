"""Whole models: the same start, logits, merged weights, files and LoRA export from both frameworks."""

import json

import hora_jax
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from hora_jax import Target
from hora_spec import AdapterSpec, init_params

from .backends import from_torch
from .models import MODELS, widen_torch
from .report import LOGITS_BOUND
from .runs import JaxRun, TorchRun, config

SPECS = {
    "residual": AdapterSpec(rank=3, hidden_dim=6, head_embed_dim=5, alpha=6, residual=True),
    "generated": AdapterSpec(rank=2, hidden_dim=6, head_embed_dim=5, a_source="hypernetwork", activation="gelu"),
    "a_per_head": AdapterSpec(rank=2, hidden_dim=6, head_embed_dim=5, sharing="b"),
    "free": AdapterSpec(rank=2, sharing="none", alpha=3),
}
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

models = pytest.mark.parametrize("model", MODELS, ids=repr)
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture
def runs(model, spec, monkeypatch) -> tuple[TorchRun, JaxRun]:
    """Both frameworks, at the start."""
    return TorchRun(model, spec, wide=True), JaxRun(model, spec, True, monkeypatch)


@models
@specs
def test_i6_starts_are_equal_to_the_bit(model, spec, runs, tally):
    starts = [run.params() for run in runs]
    shapes = {name: shape for layer in runs[1].plan.layers for name, shape in [(layer.name, layer.shape)]}
    for start in starts:
        assert list(start) == list(shapes)
        for name, params in start.items():
            for key, value in init_params(spec, shapes[name], 0, name).items():
                np.testing.assert_array_equal(params[key], value)
    tally.add("init", f"{model}, torch and JAX", {"S3", "S4", "S5", "S6", "I1", "I4", "I6"})


def test_i6_a_layer_alone_starts_as_among_others(monkeypatch, tally):
    model, spec = MODELS[1], SPECS["generated"]
    everything = TorchRun(model, spec, wide=False).params()
    name = "model.layers.1.self_attn"
    alone = peft.get_peft_model(
        model.torch(), config(spec, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    )
    run = JaxRun(model, spec, False, monkeypatch)
    targets = [Target(f"{name}.{p}_proj.kernel", p, "d (h k)", heads) for p, heads in (("q", 4), ("v", 2))]
    phi = hora_jax.init(hora_jax.make_plan(run.base, spec, targets))
    of_torch = {key.rpartition(f"{name}.q_proj.hora_hyper.default.")[2]: v for key, v in alone.named_parameters()}
    for key, value in everything[name].items():
        np.testing.assert_array_equal(from_torch(of_torch[key]), value)
        np.testing.assert_array_equal(phi[name][key][0], value)
    tally.add("init", f"{model}, torch and JAX", {"I6"})


@models
@specs
def test_f6_adapted_merged_and_exported_models_give_the_same_logits(model, spec, runs, tmp_path, tally):
    on_torch, on_jax = runs
    inputs, _ = model.batch(0)
    on_torch.train(range(2))
    on_torch.save(tmp_path / "torch")
    on_jax.load(tmp_path / "torch")
    on_jax.save(tmp_path / "jax")
    assert (tmp_path / "torch" / TENSORS).read_bytes() == (tmp_path / "jax" / TENSORS).read_bytes()
    tally.add("files", f"{model}, torch and JAX", {"F1", "F2", "F5"})

    lora_files, lora_configs = [], []
    for run, folder in zip(runs, (tmp_path / "lora-torch", tmp_path / "lora-jax"), strict=True):
        run.export_lora(folder)
        lora_files.append((folder / TENSORS).read_bytes())
        lora_configs.append({k: v for k, v in json.loads((folder / CONFIG).read_text()).items() if v is not None})
    lora_configs[0].pop("peft_version")  # which PEFT runs is known to torch alone
    assert lora_files[0] == lora_files[1]
    assert lora_configs[0] == lora_configs[1]
    tally.add("lora", f"{model}, torch and JAX", {"F6"})

    expected = on_torch.logits(inputs)
    lora = peft.PeftModel.from_pretrained(widen_torch(model.torch()), tmp_path / "lora-jax").double()
    merged = {"torch": on_torch.adapted.merge_and_unload(), "JAX": hora_jax.merge(on_jax.plan, on_jax.base, on_jax.phi)}
    results = {
        "JAX adapted": ({"D2", "D3", "L1", "L2"}, on_jax.logits(inputs)),
        "JAX merged": ({"M1", "L1", "L2", "L4"}, on_jax.apply(merged["JAX"], inputs)),
        "torch merged": ({"M1", "L1", "L2", "L4"}, on_torch.apply(merged["torch"], inputs)),
        "LoRA of either": ({"F6"}, on_torch.apply(lora, inputs)),
    }
    for name, (rules, got) in results.items():
        ratio = np.abs(got - expected).max() / np.abs(expected).max() / LOGITS_BOUND
        tally.add("model", f"{model}, torch adapted against {name}", rules, ratio)
        assert ratio < 1, name


@models
@pytest.mark.parametrize("spec", [SPECS["residual"]], ids=["residual"])
def test_m2_merging_and_unmerging_a_bfloat16_base_leaves_every_bit(model, spec, monkeypatch, tmp_path, tally):
    trained = TorchRun(model, spec, wide=False)
    trained.train(range(2))
    trained.save(tmp_path)

    on_torch = peft.PeftModel.from_pretrained(model.torch().bfloat16(), tmp_path)
    weights = {name: from_torch(value) for name, value in on_torch.state_dict().items() if "base_layer" in name}
    for _ in range(3):
        on_torch.merge_adapter()
        merged = {name: from_torch(on_torch.state_dict()[name]) for name in weights}
        assert any((merged[name] != value).any() for name, value in weights.items())
        on_torch.unmerge_adapter()
    for name, value in weights.items():
        np.testing.assert_array_equal(from_torch(on_torch.state_dict()[name]), value)
    tally.add("unmerge", f"{model}, torch", {"M2"})

    run = JaxRun(model, spec, False, monkeypatch)
    run.load(tmp_path)
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), run.base)
    before = hora_jax.weights(run.plan, base)
    kept = jax.tree.map(np.array, before)
    changed = hora_jax.merge(run.plan, base, run.phi)
    restored = hora_jax.weights(run.plan, hora_jax.replace_weights(changed, before))
    for path, value in kept.items():
        assert (np.asarray(hora_jax.weights(run.plan, changed)[path]) != value).any()
        np.testing.assert_array_equal(restored[path], value)
    tally.add("unmerge", f"{model}, JAX", {"M2"})

    for path, value in hora_jax.weights(run.plan, changed).items():
        name = next(n for n in merged if n.endswith(f"{path.removesuffix('.kernel')}.base_layer.weight"))
        torch_merged, jax_merged = np.float64(merged[name]), np.float64(value).T
        last_place = np.abs(torch_merged) * 2.0**-7  # a last float32 bit may turn one rounding to bfloat16
        assert (np.abs(torch_merged - jax_merged) <= last_place).all()
        assert (torch_merged == jax_merged).mean() > 0.99
    tally.add("merge", f"{model}, torch and JAX bfloat16", {"M1", "L1"})
