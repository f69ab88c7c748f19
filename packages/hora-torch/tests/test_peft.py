"""Everything PEFT users do with a method, done with HoRA."""

import copy
import itertools
import pickle

import hora_torch
import peft
import pytest
import torch
from hora_spec import HoraError, LayerShape, ProjectionShape, init_params
from hora_torch import HoraConfig
from hora_torch.layer import HoraLayer
from torch import nn

from .conftest import FAMILIES

SMALL = {"r": 2, "hidden_dim": 6, "head_embed_dim": 5}


def config(**kwargs):
    return HoraConfig(**(SMALL | {"init_weights": False} | kwargs))


def logits(model, inputs, **kwargs):
    with torch.no_grad():
        return model.eval()(**inputs, **kwargs).logits


@pytest.fixture
def llama(families):
    return families["llama"]


@pytest.fixture
def inputs(llama):
    return llama.inputs()


def adapted(family, **kwargs):
    return peft.get_peft_model(family.model(), config(**kwargs))


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, HoraLayer)}


def test_initial_values_are_those_of_the_specification(llama):
    model = peft.get_peft_model(llama.model().to(torch.bfloat16), HoraConfig(seed=7))
    adapter = hora_torch.to_adapter(model)
    for name, layer in adapter.layers.items():
        expected = init_params(layer.spec, layer.shape, 7, name)
        assert all((expected[key] == value).all() for key, value in layer.params.items())
    assert {param.dtype for name, param in model.named_parameters() if "hora" in name} == {torch.float32}


def test_every_tensor_is_registered_and_saved_once(llama):
    model = adapted(llama)
    modules = layers(model)
    assert [bool(module.hora_hyper) for module in modules.values()] == [True, False, True, False]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if "hora_hyper" in name]
    assert len(names) == len(set(names)) == 2 * 6
    assert not any("hora" in name for name, module in model.named_modules() if "v_proj.hora_hyper.default" in name)


def test_trainable_parameters_are_counted_and_reported(llama, capsys):
    model = adapted(llama)
    model.print_trainable_parameters()
    count = sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert f"trainable params: {count:,}" in capsys.readouterr().out
    table = hora_torch.report(model)
    assert f"{count:,} parameters" in table
    assert "model.layers.0.self_attn and 1 more" in table
    assert "q 4x8x32, v 2x8x32" in table


def test_the_generated_factors_of_one_layer_come_from_one_network(llama):
    model = adapted(llama)
    q, v = list(layers(model).values())[:2]
    assert q.hypernet("default") is v.hypernet("default")
    assert q.hypernet("default").layer == LayerShape({"q": ProjectionShape(4, 8, 32), "v": ProjectionShape(2, 8, 32)})


def test_copies_and_pickles_are_whole_and_independent(llama, inputs):
    model = adapted(llama)
    expected = logits(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, inputs), expected)
        q, v = list(layers(other).values())[:2]
        assert v.hypernet("default") is q.hora_hyper["default"]
        with torch.no_grad():
            for name, param in other.named_parameters():
                if "b_out" in name:
                    param.zero_()
        torch.testing.assert_close(logits(other, inputs), logits(llama.model(), inputs))
    assert torch.equal(logits(model, inputs), expected)


def test_several_adapters_are_switched_and_disabled(llama, inputs):
    model = adapted(llama)
    base, one = logits(llama.model(), inputs), logits(model, inputs)
    model.add_adapter("other", config(r=3, sharing="a"))
    assert torch.equal(logits(model, inputs), one)
    model.set_adapter("other")
    other = logits(model, inputs)
    assert not torch.allclose(one, other)
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    assert trainable
    assert all(".other." in name for name in trainable)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base)
    assert torch.equal(logits(model, inputs), other)
    model.set_adapter("default")
    assert torch.equal(logits(model, inputs), one)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_two_active_adapters_add_up(llama, inputs, dropout):
    model = adapted(llama, hora_dropout=dropout)
    model.add_adapter("other", config(target_modules=["v_proj"], hora_dropout=dropout))
    model.base_model.set_adapter(["default", "other"])
    together = logits(model, inputs)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "other"])
    torch.testing.assert_close(logits(merged, inputs), together, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), together, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, inputs), together)
    model.train()(**inputs).logits.sum().backward()  # each adapter drops inputs of its own
    assert all(param.grad is not None for param in model.parameters() if param.requires_grad)


def test_a_second_adapter_on_fewer_targets_has_a_leader_of_its_own(llama, inputs):
    model = adapted(llama)
    model.add_adapter("narrow", config(target_modules=["v_proj"]))
    q, v = list(layers(model).values())[:2]
    assert v.hypernet("narrow") is v.hora_hyper["narrow"]
    assert "narrow" not in q.hora_attached
    model.set_adapter("narrow")
    narrow = logits(model, inputs)
    model.delete_adapter("default")
    assert torch.equal(logits(model, inputs), narrow)
    assert not q.hora_attached


def test_deleting_the_last_adapter_leaves_the_base(llama, inputs):
    model = adapted(llama)
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model, inputs), logits(llama.model(), inputs))
    assert not any("hora_hyper" in name for name, _ in model.named_parameters())


def test_dropout_acts_on_the_branch_in_training_alone(llama, inputs):
    model = adapted(llama, hora_dropout=0.5)
    expected = logits(model, inputs)
    assert torch.equal(logits(model, inputs), expected)
    model.train()
    runs = [model(**inputs).logits for _ in range(400)]
    assert not torch.equal(runs[0], runs[1])
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_dropped_branches_average_to_the_branch():
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), config(target_modules=["0"], num_heads=2, hora_dropout=0.5)
    )
    x = torch.randn(1, 8)
    with torch.no_grad():
        expected = model.eval()(x)
        mean = torch.stack([model.train()(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["llama", "timm-vit", "mha", "mha-cross"])
def test_adapters_that_cancel_leave_noise_in_training_since_each_drops_inputs_of_its_own(families, name):
    family, inputs = families[name], families[name].inputs()
    model = adapted(family, hora_dropout=0.5)
    model.add_adapter("negative", config(hora_dropout=0.5))
    params = dict(model.named_parameters())
    with torch.no_grad():
        for key in [key for key in params if ".default." in key]:
            sign = -1 if ".b_out." in key else 1
            params[key.replace(".default.", ".negative.")].copy_(sign * params[key])

    def run(training):
        torch.manual_seed(0)
        with torch.no_grad():
            result = model.train(training)(**inputs)
        return result if isinstance(result, torch.Tensor) else result.logits

    with model.disable_adapter():
        without = run(False)
        torch.testing.assert_close(run(True), without, rtol=1e-4, atol=1e-5)
    model.base_model.set_adapter(["default", "negative"])
    torch.testing.assert_close(run(False), without, rtol=1e-4, atol=1e-5)
    assert (run(True) - without).abs().max() > 1e-2


def test_rank_and_alpha_patterns_hold_for_whole_layers(llama):
    model = adapted(llama, rank_pattern={"layers.1.self_attn.[qv]_proj": 5}, alpha_pattern={".*layers.0.*": 4.0})
    first, second = hora_torch.to_adapter(model).layers.values()
    assert (first.spec.rank, first.spec.scaling) == (2, 2.0)
    assert (second.spec.rank, second.spec.scaling) == (5, 1.0)
    with pytest.raises(HoraError, match="share rank and alpha"):
        adapted(llama, rank_pattern={"q_proj": 5})


def test_layers_to_transform_and_excluded_modules(llama):
    def names(**kwargs):
        return [name.removeprefix("base_model.model.model.") for name in layers(adapted(llama, **kwargs))]

    assert names(layers_to_transform=[1]) == ["layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]
    assert names(layers_to_transform=0, layers_pattern="layers", target_modules=["v_proj"]) == [
        "layers.0.self_attn.v_proj"
    ]
    assert names(exclude_modules=["q_proj"]) == ["layers.0.self_attn.v_proj", "layers.1.self_attn.v_proj"]
    assert names(target_modules=r".*\.1\..*v_proj") == ["layers.1.self_attn.v_proj"]


def test_excluding_everything_is_peft_s_error(llama):
    with pytest.raises(ValueError, match=r"All modules were excluded|No modules were targeted"):
        adapted(llama, exclude_modules=["q_proj", "v_proj"])


def test_modules_to_save_are_trained_and_saved(families, tmp_path):
    family = families["vit"]
    model = adapted(family, modules_to_save=["classifier"])
    assert any("modules_to_save" in name for name, param in model.named_parameters() if param.requires_grad)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(family.model(), tmp_path)
    torch.testing.assert_close(logits(loaded, family.inputs()), logits(model, family.inputs()), rtol=1e-5, atol=1e-6)


def test_injection_without_a_peft_model(llama, inputs):
    expected = logits(adapted(llama, init_weights=True, hora_alpha=1.0), inputs)
    model = peft.inject_adapter_in_model(config(init_weights=True, hora_alpha=1.0), llama.model())
    assert torch.equal(logits(model, inputs), expected)
    state = peft.get_peft_model_state_dict(model)
    assert {key.partition(".hora_hyper.")[0] for key in state} == {
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    }


def test_injection_from_a_state_dict_finds_all_targets_of_a_layer(llama, inputs):
    source = adapted(llama)
    state = peft.get_peft_model_state_dict(source)
    target = config(target_modules=["q_proj", "v_proj"])
    model = peft.inject_adapter_in_model(
        target, llama.model(), state_dict={key.removeprefix("base_model.model."): value for key, value in state.items()}
    )
    peft.set_peft_model_state_dict(model, state)
    assert torch.equal(logits(model, inputs), logits(source, inputs))


@pytest.mark.parametrize("name", ["deepseek-v3", "gpt-neox", "gpt2-cross"])
def test_injection_from_a_state_dict_finds_projections_by_their_rows(name):
    family = FAMILIES[name]
    source = peft.get_peft_model(family.model(), config()).eval()
    state = {key.removeprefix("base_model.model."): v for key, v in peft.get_peft_model_state_dict(source).items()}
    target = config(target_modules=list(family.modules))
    model = peft.inject_adapter_in_model(target, family.model(), state_dict=state)
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(source))
    inputs = family.inputs()
    assert torch.equal(model.eval()(**inputs).logits, source(**inputs).logits)


def test_transformers_adds_saves_and_loads_adapters(llama, inputs, tmp_path):
    model = llama.model()
    base = logits(model, inputs)
    model.add_adapter(config(), adapter_name="mine")
    expected = logits(model, inputs)
    assert not torch.equal(expected, base)
    model.disable_adapters()
    assert torch.equal(logits(model, inputs), base)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    loaded = llama.model()
    loaded.load_adapter(str(tmp_path), adapter_name="theirs")
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=1e-5, atol=1e-6)
    assert loaded.active_adapters() == ["theirs"]


def test_auto_classes_find_the_method(llama, inputs, tmp_path):
    base = llama.model()
    base.save_pretrained(tmp_path / "base")
    model = adapted(llama, task_type="CAUSAL_LM")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs))


def test_adapters_in_bfloat16_on_request(llama, inputs):
    base = llama.model().to(torch.bfloat16)
    model = peft.get_peft_model(base, config(), autocast_adapter_dtype=False)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert logits(model, inputs).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "timm-vit", "mha", "mha-cross"])
def test_each_sample_of_a_mixed_batch_gets_its_adapter(families, name):
    family = families[name]
    model = adapted(family)
    model.add_adapter("other", config(seed=3, target_modules=list(family.modules)[-1:]))
    model.eval()
    inputs = family.inputs()
    batch = 1 if name == "mha-cross" else 0  # sequence first

    def run(**kwargs):
        with torch.no_grad():
            result = model(**inputs, **kwargs)
        return result if isinstance(result, torch.Tensor) else result.logits

    base_rows, rows = {}, {}
    with model.disable_adapter():
        base_rows["__base__"] = run()
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        rows[adapter] = run()
    rows |= base_rows
    model.set_adapter("default")
    for names in (["other", "__base__"], ["default", "other"], ["__base__", "__base__"]):
        mixed = run(adapter_names=names)
        for i, adapter in enumerate(names):
            torch.testing.assert_close(mixed.select(batch, i), rows[adapter].select(batch, i), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rows["default"], rows["other"], rtol=1e-3, atol=1e-3)


THREE = [
    *itertools.permutations(["default", "other", "__base__"]),
    ("third", "other", "default"),
    ("other", "third", "other"),
    ("third", "__base__", "third"),
]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "timm-vit", "mha", "mha-cross"])
def test_each_of_three_samples_gets_its_adapter_in_any_order(families, name):
    family = families[name]
    batch = 1 if name == "mha-cross" else 0  # sequence first
    inputs = {key: torch.cat([x, x.flip(batch)], batch).narrow(batch, 0, 3) for key, x in family.inputs().items()}
    model = adapted(family)
    for adapter in ("other", "third"):
        model.add_adapter(adapter, config())

    def run(**kwargs):
        with torch.no_grad():
            result = model.eval()(**inputs, **kwargs)
        return (result if isinstance(result, torch.Tensor) else result.logits).movedim(batch, 0)

    alone = {}
    with model.disable_adapter():
        alone["__base__"] = run()
    for adapter in ("third", "other", "default"):
        model.set_adapter(adapter)
        alone[adapter] = run()
    for one, other in itertools.combinations(alone.values(), 2):
        assert ((one - other).abs().flatten(1).amax(1) > 1e-2).all(), "adapters must differ on every sample"
    for names in THREE:
        expected = torch.stack([alone[adapter][i] for i, adapter in enumerate(names)])
        torch.testing.assert_close(run(adapter_names=list(names)), expected, rtol=1e-4, atol=1e-5)


def test_mixed_batches_refuse_what_they_cannot_do(llama, inputs):
    model = adapted(llama).eval()
    with pytest.raises(HoraError, match="non-existing adapter"):
        model(**inputs, adapter_names=["default", "nobody"])
    with pytest.raises(HoraError, match="same as the number of inputs"):
        model(**inputs, adapter_names=["default"])
    with pytest.raises(HoraError, match="training mode"):
        model.train()(**inputs, adapter_names=["default", "default"])
    model.eval().merge_adapter()
    with pytest.raises(HoraError, match="merged adapters"):
        model(**inputs, adapter_names=["default", "default"])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_a_model_changes_nothing(llama, inputs, use_reentrant):
    def gradients(checkpointing):
        model = adapted(llama, hora_dropout=0.3).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        model(**inputs).logits.square().sum().backward()
        return {name: param.grad for name, param in model.named_parameters() if param.requires_grad}

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "timm-vit"])
def test_adapted_models_compile_as_one_graph(families, name):
    family = families[name]
    model = adapted(family).train()
    inputs = family.inputs()
    result = model(**inputs)
    expected = result if isinstance(result, torch.Tensor) else result.logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result = compiled(**inputs)
    actual = result if isinstance(result, torch.Tensor) else result.logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    actual.sum().backward()
    assert all(param.grad is not None for param in model.parameters() if param.requires_grad)


def test_generation_works(llama, inputs):
    model = adapted(llama).eval()
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    merged = model.merge_and_unload().generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, merged)


def test_hooked_base_layers_are_called(llama, inputs):
    """Offloading and sharding put hooks on the base layer, which must then run."""
    model = adapted(llama)
    expected = logits(model, inputs)
    called = []
    for layer in layers(model).values():
        layer.base_layer.register_forward_hook(lambda *args: called.append(True))
    torch.testing.assert_close(logits(model, inputs), expected)
    assert len(called) == 4


def test_registering_twice_is_harmless():
    hora_torch.registration.add_peft_type()
    hora_torch.registration.register()
    assert peft.PeftType("HORA") is peft.PeftType.HORA
    assert [name for name in peft.PeftType.__members__ if name == "HORA"] == ["HORA"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"r": 0}, "rank"),
        ({"hora_dropout": 1.0}, "hora_dropout"),
        ({"route": "fast"}, "route"),
        ({"bias": "lora_only"}, "bias"),
        ({"sharing": "some"}, "sharing"),
        ({"fused_projections": ("o-proj",)}, "fused_projections"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
        ({"hora_spec_version": 2}, "version"),
    ],
)
def test_a_config_out_of_its_domain_is_refused(kwargs, message):
    with pytest.raises(HoraError, match=message):
        HoraConfig(**kwargs)
