"""Parameters that are elsewhere while nobody computes with them: the numbers of the whole model, or a HoraError."""

import accelerate
import hora_torch
import peft
import pytest
import torch
from hora_spec import HoraError
from hora_torch.layer import HoraLayer

from .oracle import adapted, agree, config, current, differ, evaluate, output, parameters, truth


def by_layer(model):
    """The second layer on disk, everything else on the processor."""
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name.rpartition(".")[0]: "disk" if ".1." in name else "cpu" for name, _ in held}


OFFLOADS = {
    "cpu_offload": lambda model, path: accelerate.cpu_offload(model, torch.device("cpu")),
    "disk_offload": lambda model, path: accelerate.disk_offload(model, str(path), torch.device("cpu")),
    "dispatch_model": lambda model, path: accelerate.dispatch_model(model, by_layer(model), offload_dir=str(path)),
}


@pytest.fixture(params=OFFLOADS)
def offload(request, tmp_path):
    """Moves a model away and leaves hooks that fetch it for each call."""
    return lambda model: OFFLOADS[request.param](model, tmp_path / "away")


def agree_or_refuse(compute, expected):
    """Whether `compute` gave what is expected; otherwise it raised a HoraError."""
    try:
        actual = compute()
    except HoraError:
        return False
    agree(actual, expected)
    return True


MUST_WORK = ["llama", "vit", "gpt2"]


@pytest.mark.parametrize("name", [*MUST_WORK, "timm-vit", "mha"])
def test_an_offloaded_adapted_model_computes_the_same(families, name, offload):
    family = families[name]
    model = adapted(family)
    expected = evaluate(model, family.inputs())
    offload(model)
    worked = agree_or_refuse(lambda: evaluate(model, family.inputs()), expected)
    assert worked or name not in MUST_WORK
    assert agree_or_refuse(lambda: evaluate(model, family.inputs()), expected) == worked


def test_a_fixed_a_is_where_it_is_needed(families, offload):
    family = families["llama"]
    model = adapted(family, sharing="a", a_source="fixed")
    expected = evaluate(model, family.inputs())
    offload(model)
    agree(evaluate(model, family.inputs()), expected)


def start(model, family):
    return hora_torch.joint_a(model, [family.inputs()], lambda model, batch: output(model(**batch)).square().mean())


def test_i7_an_adapter_on_an_offloaded_base_starts_where_it_would_start_beside_it(families, offload):
    family, fixed = families["llama"], {"sharing": "a", "a_source": "fixed", "init_weights": True}
    expected = start(adapted(family, **fixed), family)
    base = family.model()
    offload(base)
    found = start(peft.get_peft_model(base, config(**fixed)), family)
    for name, own in expected.params.items():
        for key, a in own.items():
            torch.testing.assert_close(torch.tensor(found.params[name][key]), torch.tensor(a))


def test_i7_an_adapter_that_is_offloaded_itself_is_refused(families):
    model = adapted(families["llama"], sharing="a", a_source="fixed", init_weights=True)
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(HoraError, match=r"before the model is offloaded \(spec I7\)"):
        start(model, families["llama"])


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_an_adapter_added_to_an_offloaded_model_starts_at_the_base(families, name, offload):
    family = families[name]
    base = family.model()
    offload(base)
    model = peft.get_peft_model(base, config(init_weights=True))
    agree_or_refuse(lambda: evaluate(model, family.inputs()), evaluate(family.model(), family.inputs()))


@pytest.mark.parametrize("load", ["from_pretrained", "load_adapter", "set_peft_model_state_dict"])
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_an_adapter_loaded_into_an_offloaded_model_computes_the_same(families, name, load, offload, tmp_path):
    family = families[name]
    source = adapted(family)
    source.save_pretrained(tmp_path / "adapter")
    expected = evaluate(source, family.inputs())
    base = family.model()
    offload(base)

    def compute():
        if load == "from_pretrained":
            model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        else:
            model = peft.get_peft_model(base, config(init_weights=True))
            if load == "load_adapter":
                model.load_adapter(tmp_path / "adapter", "mine")
                model.set_adapter("mine")
            else:
                peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(source))
        return evaluate(model, family.inputs())

    agree_or_refuse(compute, expected)


@pytest.mark.parametrize("name", ["llama", "vit", "timm-vit"])
def test_merging_an_offloaded_model_is_right_or_refused(families, name, offload):
    family = families[name]
    model = adapted(family)
    expected = evaluate(model, family.inputs())
    offload(model)
    computes = agree_or_refuse(lambda: evaluate(model, family.inputs()), expected)

    def merge():
        model.merge_adapter()
        return evaluate(model, family.inputs())

    if agree_or_refuse(merge, expected):
        model.unmerge_adapter()
    assert not any(module.merged for module in model.modules() if isinstance(module, HoraLayer))
    assert agree_or_refuse(lambda: evaluate(model, family.inputs()), expected) == computes


def test_unloading_an_offloaded_model_is_right_or_refused(families, offload):
    family = families["llama"]
    model = adapted(family)
    expected = evaluate(model, family.inputs())
    offload(model)
    if not agree_or_refuse(lambda: evaluate(model.merge_and_unload(), family.inputs()), expected):
        agree(evaluate(model, family.inputs()), expected)


def test_an_offloaded_adapter_is_exported_right_or_refused(families, offload, tmp_path):
    family = families["llama"]
    model = adapted(family)
    expected = evaluate(model, family.inputs())
    offload(model)

    def compute():
        hora_torch.export_lora(model, tmp_path / "lora")
        return evaluate(peft.PeftModel.from_pretrained(family.model(), tmp_path / "lora"), family.inputs())

    agree_or_refuse(compute, expected)


class Gathered:
    """Parameters that exist only while the module that owns them runs, as under ZeRO-3."""

    def __init__(self, model):
        self.model, self.backward_runs = model, False
        self.full = {param: param.detach().clone() for param in model.parameters()}
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(lambda module, args: self.gather(module))
                module.register_forward_hook(lambda module, args, result: self.release(module), always_call=True)
                self.release(module)

    def gather(self, module, recurse=False):
        for param in module.parameters(recurse=recurse):
            param.data = self.full[param].clone()

    def release(self, module):
        for param in module.parameters(recurse=False):
            param.data = param.data if self.backward_runs else torch.empty(0)

    def backward(self, loss):
        self.gather(self.model, recurse=True)
        self.backward_runs = True
        loss.backward()


def gradients(model):
    return {name: param.grad for name, param in parameters(model).items()}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
@pytest.mark.parametrize("name", [*MUST_WORK, "timm-vit", "mha"])
def test_parameters_gathered_for_each_module_give_the_same_gradients(families, name, checkpointing):
    family = families[name]
    if checkpointing is not None and name in ("timm-vit", "mha"):
        pytest.skip("transformers' switch for checkpointing")

    def start():
        model = adapted(family, hora_dropout=0.25).train()
        if checkpointing is not None:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        return model

    def run(model, backward):
        torch.manual_seed(3)
        result = output(model(**family.inputs()))
        backward(result.square().sum())
        return result.detach()

    whole = start()
    expected = run(whole, torch.Tensor.backward)
    model = start()
    gathered = Gathered(model)
    assert agree_or_refuse(lambda: run(model, gathered.backward), expected) or name not in MUST_WORK
    if name in MUST_WORK:
        torch.testing.assert_close(gradients(model), gradients(whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*MUST_WORK, "timm-vit"])
def test_parameters_gathered_anew_are_the_present_ones(families, name):
    family = families[name]
    model = adapted(family)
    before = truth(family, current(model))
    own = list(parameters(model).values())
    gathered = Gathered(model)
    agree(evaluate(model, family.inputs()), before)
    for param in own:
        gathered.full[param] *= 1.2
    now = evaluate(model, family.inputs())
    gathered.gather(model, recurse=True)
    expected = truth(family, current(model))
    differ(before, expected)
    agree(now, expected)
