"""Parameter groups: A and B apart, everything once, nothing by a name that HoRA does not have."""

import hora_torch
import peft
import peft.optimizers
import pytest
import torch
import transformers
from hora_spec import HoraError
from hora_torch import HoraConfig

SMALL = {"r": 2, "hidden_dim": 6, "head_embed_dim": 5}
METHODS = {
    "default": {},
    "A generated": {"a_source": "hypernetwork", "residual": True},
    "A free": {"sharing": "b"},
    "both free": {"sharing": "none"},
    "raw embeddings": {"normalize": False},
    "gated": {"residual": True, "gate": 0.1},
    "A fixed": {"a_source": "fixed"},
}


def adapted(family, **kwargs):
    return peft.get_peft_model(family.model(), HoraConfig(**SMALL | kwargs))


def named(model, groups):
    names = {param: name for name, param in model.named_parameters()}
    return {group["name"]: {names[param] for param in group["params"]} for group in groups}


@pytest.mark.parametrize("method", METHODS)
def test_every_trained_parameter_is_in_one_group(families, method):
    model = adapted(families["llama"], modules_to_save=["lm_head"], bias="all", **METHODS[method])
    groups = hora_torch.param_groups(model, 1e-3, ratio=4, weight_decay=0.1)
    params = [param for group in groups for param in group["params"]]
    assert len(params) == len(set(params))
    assert set(params) == {param for param in model.parameters() if param.requires_grad}
    assert all(group["params"] for group in groups)
    torch.optim.AdamW(groups).step()


@pytest.mark.parametrize("method", METHODS)
def test_parameters_are_told_apart_by_the_factor_that_depends_on_them(families, method):
    model = adapted(families["llama"], init_weights=False, **METHODS[method])
    found = named(model, hora_torch.param_groups(model, 1e-3))
    hypernet = next(module for module in model.modules() if isinstance(module, hora_torch.hypernet.HoraHypernet))
    (a, b), own = hypernet()["q"], {key: p for key, p in hypernet.named_parameters() if p.requires_grad}
    of_v = {f"{kind}.v" for kind in ("a", "a_out", "b", "b_out", "gate")}
    for part, factor in (("A", a), ("B", b)):
        if not factor.requires_grad:  # a fixed A is in no group
            assert not any(key[0] == part for key in found)
            continue
        grads = torch.autograd.grad(factor.sum(), list(own.values()), allow_unused=True)
        reached = {key for key, grad in zip(own, grads, strict=True) if grad is not None and "v" not in key.split(".")}
        listed = {name for key, names in found.items() if key[0] == part for name in names if "layers.0" in name}
        assert {name.partition(".default.")[2] for name in listed} - of_v == reached


def test_rates_and_decay_are_as_said(families):
    model = adapted(families["llama"], a_source="hypernetwork", modules_to_save=["lm_head", "norm"])
    groups = {group["name"]: group for group in hora_torch.param_groups(model, 1e-3, ratio=16, weight_decay=0.1)}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "A": (1e-3, 0.1),
        "A, no decay": (1e-3, 0.0),
        "B": (16e-3, 0.1),
        "B, no decay": (16e-3, 0.0),
        "other": (1e-3, 0.1),
        "other, no decay": (1e-3, 0.0),
    }
    found = named(model, groups.values())
    assert all(name.endswith("a_seed") for name in found["A, no decay"])
    assert all(name.endswith("head_embed") for name in found["B, no decay"])
    assert all("norm" in name for name in found["other, no decay"])


@pytest.mark.parametrize("method", ["A generated", "gated"])
def test_the_free_part_of_b_decays_on_its_own(families, method):
    model = adapted(families["llama"], **METHODS[method])
    groups = hora_torch.param_groups(model, 1e-3, ratio=4, weight_decay=0.1, residual_decay=0.5)
    decays = {group["name"]: group["weight_decay"] for group in groups}
    assert decays.pop("B, residual") == 0.5
    assert set(decays.values()) == {0.0, 0.1}
    own = [name.partition(".default.")[2] for name in named(model, groups)["B, residual"]]
    assert {name.partition(".")[0] for name in own} == {"b"}
    assert len(own) == 2 * 2  # q and v of two layers
    assert {group["lr"] for group in groups if group["name"][0] == "B"} == {4e-3}


def test_by_default_all_rates_are_equal_and_nothing_decays(families):
    groups = hora_torch.param_groups(adapted(families["llama"], **METHODS["gated"]), 1e-3)
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(1e-3, 0.0)}


def test_vectors_and_norms_of_any_rank_do_not_decay():
    base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm((2, 4)), torch.nn.Linear(4, 4))
    config = HoraConfig(**SMALL, target_modules=["0"], num_heads=2, modules_to_save=["1", "2"])
    model = peft.get_peft_model(base, config)
    found = named(model, hora_torch.param_groups(model, 1e-3, weight_decay=0.1))
    assert {name.partition("model.model.")[2] for name in found["other"]} == {"2.modules_to_save.default.weight"}
    assert len(found["other, no decay"]) == 3


def test_a_tied_parameter_that_is_trained_is_in_its_group_once(families):
    model = adapted(families["gpt2"])
    tied = model.get_output_embeddings().weight.requires_grad_(True)
    assert tied is model.get_input_embeddings().weight
    groups = hora_torch.param_groups(model, 1e-3)
    assert sum(param is tied for group in groups for param in group["params"]) == 1


def test_embeddings_that_are_not_normalised_decay(families):
    model = adapted(families["llama"], normalize=False)
    assert {group["name"] for group in hora_torch.param_groups(model, 1e-3)} == {"A", "B"}


def test_an_inactive_adapter_is_in_no_group(families):
    model = adapted(families["llama"])
    model.add_adapter("other", HoraConfig(**SMALL))
    names = set.union(*named(model, hora_torch.param_groups(model, 1e-3)).values())
    assert names
    assert all(".default." in name for name in names)


@pytest.mark.parametrize(
    "kwargs", [{"lr": 0.0}, {"ratio": 0.0}, {"weight_decay": -0.1}, {"residual_decay": -0.1}, {"lr": float("nan")}]
)
def test_rates_out_of_their_domain_are_refused(families, kwargs):
    with pytest.raises(HoraError, match="lr and ratio"):
        hora_torch.param_groups(adapted(families["llama"]), **({"lr": 1e-3} | kwargs))


def test_a_model_in_which_nothing_is_trained_has_no_groups(families):
    model = adapted(families["llama"])
    hora_torch.freeze(model)
    with pytest.raises(HoraError, match="got none that requires gradients"):
        hora_torch.param_groups(model, 1e-3)


OPTIMIZERS = {
    "create_loraplus_optimizer": {"optimizer_cls": torch.optim.AdamW, "lr": 1e-3, "loraplus_lr_ratio": 16},
    "create_lorafa_optimizer": {"r": 2, "lora_alpha": 2, "lr": 1e-3},
    "create_riemannian_optimizer": {"optimizer_cls": torch.optim.AdamW, "lr": 1e-3},
}


@pytest.mark.parametrize("name", peft.optimizers.__all__)
def test_each_of_peft_s_optimisers_refuses_hora_and_still_takes_lora(families, name):
    create = getattr(peft.optimizers, name)
    before = adapted(families["llama"])
    with pytest.raises(ValueError, match=r"hora_torch\.param_groups|did not find any trainable lora_A"):
        create(before, **OPTIMIZERS[name])
    lora = peft.get_peft_model(families["llama"].model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    optimiser = create(lora, **OPTIMIZERS[name])
    loss = lora(**families["llama"].inputs(), labels=families["llama"].inputs()["input_ids"]).loss
    loss.backward()
    optimiser.step()
    assert any(bool(value.any()) for key, value in lora.state_dict().items() if "lora_B" in key)


def test_knowing_hora_twice_is_harmless():
    names = peft.optimizers.loraplus.get_parameter_names
    hora_torch.lora_only.install()
    assert peft.optimizers.loraplus.get_parameter_names is names


def test_gates_decay_by_the_trainer_s_groups_and_not_by_ours(families):
    model = adapted(families["llama"], **METHODS["gated"])
    gates = {name for name, _ in model.named_parameters() if ".gate." in name}
    assert gates
    assert gates <= set(transformers.Trainer.get_decay_parameter_names(None, model))
    groups = hora_torch.param_groups(model, 1e-3, weight_decay=0.1)
    ours = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {ours[id(param)] for name, param in model.named_parameters() if name in gates} == {0.0}
