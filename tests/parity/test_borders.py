"""Bad input: both frameworks refuse it with a HoraError, and nothing has changed, in a model or on disk."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hora_jax
import hora_torch
import numpy as np
import peft
import pytest
from flax import nnx
from hora_jax import Target, presets
from hora_spec import AdapterSpec, HoraError
from hora_torch import HoraConfig
from safetensors.numpy import load_file, save_file
from torch import nn

from .backends import from_torch
from .models import MODELS
from .runs import TorchRun, config

LLAMA = MODELS[1]
SPEC = AdapterSpec(rank=2, hidden_dim=4, head_embed_dim=3)
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

METHODS = {
    "rank_0": ("S1", {"rank": 0}),
    "rank_a_fraction": ("S1", {"rank": 2.5}),
    "hidden_0": ("S1", {"hidden_dim": 0}),
    "alpha_negative": ("S1", {"alpha": -1.0}),
    "alpha_not_finite": ("S1", {"alpha": float("nan")}),
    "gain_0": ("S1", {"gain": 0.0}),
    "sharing_unknown": ("S1", {"sharing": "c"}),
    "activation_unknown": ("S1", {"activation": "swish"}),
    "residual_of_a_free_b": ("S2", {"sharing": "a", "residual": True}),
    "generated_a_per_head": ("S2", {"sharing": "b", "a_source": "hypernetwork"}),
    "gain_of_nothing": ("S2", {"sharing": "none", "gain": 1.0}),
    "normalised_number": ("S2", {"head_embed_dim": 1}),
}
TARGETS = {
    "heads_that_do_not_divide_rows": ("S3", {"num_heads": 5}, presets.llama(num_heads=5)),
    "heads_that_do_not_divide_heads": (
        "S5",
        {"num_heads": 4, "num_kv_heads": 3},
        presets.llama(num_heads=4, num_kv_heads=3),
    ),
    "a_layer_without_projections": ("S4", {"target_modules": ["absent"]}, (Target("**.absent.kernel", "q", heads=2),)),
    "no_linear_map": ("L3", {"target_modules": ["norm"], "num_heads": 2}, (Target("**.norm.scale", "q", heads=2),)),
}


def refused(call: Callable[[], Any]) -> str:
    """Message of the HoraError that a call must end in."""
    with pytest.raises(HoraError) as caught:
        call()
    return str(caught.value)


@pytest.fixture(scope="module")
def base() -> nnx.Module:
    return LLAMA.jax(LLAMA.torch())


@pytest.mark.parametrize(("rule", "values"), METHODS.values(), ids=METHODS)
def test_s2_methods_that_make_no_sense(rule, values, tally):
    renamed = {{"rank": "r", "alpha": "hora_alpha"}.get(key, key): value for key, value in values.items()}
    assert f"spec {rule}" in refused(lambda: HoraConfig(**renamed))
    assert f"spec {rule}" in refused(lambda: AdapterSpec(**values))  # what hora_jax.make_plan takes
    tally.add("borders", "torch and JAX", {rule, "E1"})


@pytest.mark.parametrize(("rule", "options", "targets"), TARGETS.values(), ids=TARGETS)
def test_s5_targets_that_do_not_fit(rule, options, targets, base, tally):
    model = LLAMA.torch()
    before = {name: from_torch(value) for name, value in model.state_dict().items()}
    refused(lambda: peft.get_peft_model(model, config(SPEC, **options)))
    refused(lambda: hora_jax.make_plan(base, SPEC, targets))
    after = model.state_dict()
    assert before.keys() == after.keys(), "torch models are changed in place: not by a refusal"
    for name, value in before.items():
        np.testing.assert_array_equal(from_torch(after[name]), value)
    tally.add("borders", "torch and JAX", {rule, "E1", "E2"})


def test_s8_one_a_does_not_read_two_widths(tally):
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, vdim=6, batch_first=True)})
    assert "spec S8" in refused(
        lambda: peft.get_peft_model(model, HoraConfig(r=2, tie_a=True, target_modules=["attn"]))
    )
    params = {"q": np.zeros((8, 8)), "v": np.zeros((8, 6))}
    targets = [Target(p, p, "(h k) d", 2, layer="attn") for p in params]
    assert "spec S8" in refused(lambda: hora_jax.make_plan(params, AdapterSpec(2, tie_a=True), targets))
    tally.add("borders", "torch and JAX", {"S8", "E1"})


def test_i1_a_seed_is_not_negative(base, tally):
    assert "spec I1" in refused(lambda: peft.get_peft_model(LLAMA.torch(), config(SPEC, seed=-1)))
    assert "spec I1" in refused(lambda: hora_jax.init(hora_jax.make_plan(base, SPEC, LLAMA.targets), seed=-1))
    tally.add("borders", "torch and JAX", {"I1", "E1"})


def tensors_changed(change: Callable[[dict[str, Any], str], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors, next(key for key in sorted(tensors) if key.endswith("b_out.q")))
        save_file(tensors, folder / TENSORS, {"format": "pt"})

    return damage


def config_changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        change(values)
        (folder / CONFIG).write_text(json.dumps(values))

    return damage


def truncate(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-8])


FILES = {
    "tensor_missing": ({"S7", "F5"}, tensors_changed(lambda tensors, key: tensors.pop(key))),
    "tensor_extra": ({"S7", "F5"}, tensors_changed(lambda tensors, key: tensors.update({f"{key}x": tensors[key]}))),
    "tensor_transposed": ({"S6"}, tensors_changed(lambda tensors, key: tensors.update({key: tensors[key].T.copy()}))),
    "tensor_not_finite": ({"S7", "F5"}, tensors_changed(lambda tensors, key: tensors[key].fill(np.nan))),
    "tensors_truncated": ({"F5"}, truncate),
    "version_2": ({"F4"}, config_changed(lambda values: values.update(hora_spec_version=2))),
    "field_unknown": ({"F4"}, config_changed(lambda values: values["hora_layers"][0].update(colour="red"))),
    "layout_of_another_weight": (
        {"L3", "F2"},
        config_changed(lambda values: values["hora_layers"][0]["projections"]["v"]["layout"].update(pattern="d (h k)")),
    ),
}


def without_digests(folder: Path) -> None:
    """The config as it was written before there were digests, so that the damage itself must be seen."""
    values = json.loads((folder / CONFIG).read_text())
    for key in ("hora_layers_sha256", "hora_tensors_sha256"):
        values.pop(key)
    (folder / CONFIG).write_text(json.dumps(values))


@pytest.mark.parametrize("digests", [True, False], ids=["digests", "older"])
@pytest.mark.parametrize(("rules", "damage"), FILES.values(), ids=FILES)
def test_f5_damaged_files(rules, damage, digests, base, tmp_path, tally):
    run = TorchRun(LLAMA, SPEC, wide=False)
    run.save(tmp_path)
    damage(tmp_path)
    if not digests:
        without_digests(tmp_path)
    before = {name: from_torch(value) for name, value in run.adapted.state_dict().items()}
    with pytest.raises(HoraError):
        run.adapted.load_adapter(tmp_path, "other")
    for name, value in before.items():
        np.testing.assert_array_equal(from_torch(run.adapted.state_dict()[name]), value)
    plan = hora_jax.make_plan(base, SPEC, LLAMA.targets)
    told = rules | {"F7"} if digests else rules
    assert set(re.findall(r"\b[A-Z]\d\b", refused(lambda: hora_jax.load_adapter(tmp_path, plan)))) & told
    tally.add("borders", "torch and JAX", told | {"E1", "E2"})


def test_f6_an_export_destroys_nothing(base, tmp_path, tally):
    run, plan = TorchRun(LLAMA, SPEC, wide=False), hora_jax.make_plan(base, SPEC, LLAMA.targets)
    run.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    refused(lambda: hora_torch.export_lora(run.adapted, tmp_path))
    refused(lambda: hora_jax.export_lora(plan, hora_jax.init(plan), tmp_path))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    tally.add("borders", "torch and JAX", {"F3", "F6", "E2"})


def test_f3_an_adapter_is_replaced_whole(base, tmp_path, tally):
    run, plan = TorchRun(LLAMA, SPEC, wide=False), hora_jax.make_plan(base, SPEC, LLAMA.targets)
    run.save(tmp_path)
    names, tensors = {file.name for file in tmp_path.iterdir()}, (tmp_path / TENSORS).read_bytes()
    hora_jax.save_adapter(tmp_path, plan, hora_jax.init(plan, seed=3))
    assert {file.name for file in tmp_path.iterdir()} == names
    assert (tmp_path / TENSORS).read_bytes() != tensors
    run.load(tmp_path)
    run.save(tmp_path)
    hora_jax.load_adapter(tmp_path, plan)
    tally.add("files", "llama, torch and JAX", {"F3"})


def test_m3_a_merged_model_is_not_merged_again(base, tally):
    run, plan = TorchRun(LLAMA, SPEC, wide=False), hora_jax.make_plan(base, SPEC, LLAMA.targets)
    run.train(range(1))
    run.adapted.merge_adapter()
    merged = {name: from_torch(value) for name, value in run.adapted.state_dict().items()}
    with pytest.warns(UserWarning, match="already merged"):  # PEFT's own answer, before it asks the method
        run.adapted.merge_adapter()
    for name, value in merged.items():
        np.testing.assert_array_equal(from_torch(run.adapted.state_dict()[name]), value)
    phi = hora_jax.init(plan)
    tree = hora_jax.merge(plan, base, phi)
    again = hora_jax.merge(plan, tree, phi)  # pure: one more delta, which is zero at the start
    for path, value in hora_jax.weights(plan, again).items():
        np.testing.assert_array_equal(value, hora_jax.weights(plan, tree)[path])
    tally.add("borders", "torch and JAX", {"M3", "E2"})
