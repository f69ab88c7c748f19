"""Factors are kept for the duration of a scope that someone opened, never by a guess."""

import copy

import hora_torch
import peft
import pytest
import torch
from hora_spec import HoraError
from hora_torch import lifetime
from hora_torch.lifetime import during_call
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from .oracle import adapted, agree, config, current, differ, evaluate, output, parameters, truth


class Generations(TorchDispatchMode):
    """Counts normalisations of head embeddings; a LLaMA has no other LayerNorm."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.native_layer_norm.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def family(families):
    return families["llama"]


@pytest.fixture
def model(family):
    return adapted(family)


def scale(model, factor=1.2):
    """A write that raises no version."""
    for param in parameters(model).values():
        param.data *= factor


def test_a_scope_generates_once_and_changes_no_number(model, family):
    inputs = family.inputs()
    with Generations() as alone:
        expected = evaluate(model, inputs)
    with hora_torch.cached_factors(model), Generations() as kept:
        first, second = evaluate(model, inputs), evaluate(model, inputs)
    assert 0 < kept.count <= alone.count
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


def test_nothing_is_kept_between_calls_outside_a_scope(model, family):
    with Generations() as seen:
        evaluate(model, family.inputs())
        once = seen.count
        evaluate(model, family.inputs())
    assert seen.count == 2 * once > 0


def test_nothing_is_kept_after_a_scope(model, family):
    with hora_torch.cached_factors(model):
        before = evaluate(model, family.inputs())
    scale(model)
    expected = truth(family, current(model))
    differ(before, expected)
    agree(evaluate(model, family.inputs()), expected)
    with hora_torch.cached_factors(model):
        agree(evaluate(model, family.inputs()), expected)


def test_a_graph_that_is_captured_is_given_nothing_from_before(model, family, monkeypatch):
    """At a replay it would read parameters that are gone by then; test_gpu.py captures one."""
    with Generations() as alone:
        evaluate(model, family.inputs())
    with hora_torch.cached_factors(model):
        evaluate(model, family.inputs())
        with Generations() as between:
            evaluate(model, family.inputs())
        monkeypatch.setattr(lifetime, "_capturing", lambda: True)
        with Generations() as captured:
            evaluate(model, family.inputs())
        monkeypatch.undo()
    assert between.count < captured.count == alone.count


def test_generation_opens_a_scope_of_its_own(model, family):
    asked = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with Generations() as alone:
        evaluate(model, family.inputs())
    with Generations() as seen:
        model.generate(**family.inputs(), **asked)
    assert seen.count <= alone.count


def in_place(model):
    with torch.no_grad():
        parameters(model)["model.layers.1.self_attn.q_proj.hora_hyper.b_in"][0, 0] += 1


def by_numpy(model):
    parameters(model)["model.layers.1.self_attn.q_proj.hora_hyper.b_out.v"].detach().numpy()[0, 0] += 1


def by_assignment(model):
    name = next(name for name, _ in model.named_parameters() if "hora_hyper" in name)
    model.load_state_dict({name: model.state_dict()[name] + 1}, strict=False, assign=True)


def by_casting(model):
    model.to(torch.bfloat16)


WRITES = [in_place, by_numpy, by_assignment, by_casting, scale]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_parameter_that_changes_inside_a_scope_is_an_error_on_leaving(model, family, write):
    def change():
        with hora_torch.cached_factors(model):
            evaluate(model, family.inputs())
            write(model)

    with pytest.raises(HoraError):
        change()
    if write is not by_casting:
        agree(evaluate(model, family.inputs()), truth(family, current(model)))


def test_an_exception_inside_a_scope_is_the_one_that_is_raised(model, family):
    def fail():
        with hora_torch.cached_factors(model):
            evaluate(model, family.inputs())
            scale(model)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    agree(evaluate(model, family.inputs()), truth(family, current(model)))


def test_scopes_nest(model, family):
    expected = evaluate(model, family.inputs())
    with hora_torch.cached_factors(model), Generations() as seen:
        evaluate(model, family.inputs())
        once = seen.count
        with hora_torch.cached_factors(model):
            assert torch.equal(evaluate(model, family.inputs()), expected)
        assert torch.equal(evaluate(model, family.inputs()), expected)
    assert seen.count <= 2 * once


def test_parameters_that_are_lent_for_one_call_inside_a_scope_are_used(model, family):
    """``functional_call`` puts its tensors in the place of the parameters, and takes them away again."""
    own = {id(param) for param in parameters(model).values()}
    params = {name: param.detach() * 1.2 for name, param in model.named_parameters() if id(param) in own}
    expected = output(functional_call(model, params, (), family.inputs())).detach()
    with hora_torch.cached_factors(model), torch.no_grad():
        before = evaluate(model, family.inputs())
        differ(before, expected)
        agree(output(functional_call(model, params, (), family.inputs())), expected)
        assert torch.equal(evaluate(model, family.inputs()), before)


def test_a_scope_of_one_model_is_none_of_another(model, family):
    other = copy.deepcopy(model)
    with hora_torch.cached_factors(model):
        evaluate(model, family.inputs())
        before = evaluate(other, family.inputs())
        scale(other)
        expected = truth(family, current(other))
        differ(before, expected)
        agree(evaluate(other, family.inputs()), expected)


def test_merging_and_exporting_inside_a_scope_read_the_parameters(model, family, tmp_path):
    def change():
        with hora_torch.cached_factors(model):
            before = evaluate(model, family.inputs())
            scale(model)
            expected = truth(family, current(model))
            differ(before, expected)
            hora_torch.export_lora(model, tmp_path)
            agree(evaluate(peft.PeftModel.from_pretrained(family.model(), tmp_path), family.inputs()), expected)
            model.merge_adapter()
            agree(evaluate(model, family.inputs()), expected)
            model.unmerge_adapter()

    with pytest.raises(HoraError):
        change()


def test_adapters_can_be_switched_and_disabled_inside_a_scope(model, family):
    model.add_adapter("other", config(seed=3, target_modules=["v_proj"]))
    inputs = family.inputs()
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = evaluate(model, inputs)
    with hora_torch.cached_factors(model):
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            assert torch.equal(evaluate(model, inputs), expected[name])
        with model.disable_adapter():
            assert torch.equal(evaluate(model, inputs), evaluate(family.model(), inputs))
        assert torch.equal(evaluate(model, inputs), expected["default"])


def test_precisions_take_turns_inside_a_scope(model, family):
    inputs = family.inputs()

    def lowered():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return evaluate(model, inputs)

    full, low = evaluate(model, inputs), lowered()
    with hora_torch.cached_factors(model):
        assert torch.equal(lowered(), low)
        assert torch.equal(evaluate(model, inputs), full)
    with hora_torch.cached_factors(model):
        assert torch.equal(evaluate(model, inputs), full)
        assert torch.equal(lowered(), low)


def gradients(model, family):
    model.zero_grad()
    output(model(**family.inputs())).square().sum().backward()
    return {name: param.grad.clone() for name, param in parameters(model).items()}


def test_gradients_inside_a_scope_are_those_outside(model, family):
    expected = gradients(model, family)
    with hora_torch.cached_factors(model):
        with torch.inference_mode():
            model(**family.inputs())
        found = gradients(model, family)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("missing", ["released", "awaited", "on meta"])
def test_a_layer_that_is_not_called_is_not_read(model, family, missing):
    """The first layer of a call generates for the others, but only from what is there."""
    second = model.base_model.model.model.layers[1].self_attn
    for projection in (second.q_proj, second.v_proj):
        projection.enable_adapters(False)
    expected = evaluate(model, family.inputs())
    hypernet = second.q_proj.hora_hyper["default"]
    if missing == "awaited":
        hypernet.await_values(needed=True)
    elif missing == "on meta":
        hypernet.to("meta")
    else:
        for param in hypernet.parameters():
            param.data = torch.empty(0)
    assert torch.equal(evaluate(model, family.inputs()), expected)


INTERCEPTED = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def test_a_call_that_records_gradients_generates_once_per_layer(families):
    family = families["vit"]
    model, base = adapted(family), family.model()
    with Generations() as own:
        base(**family.inputs())
    with Generations() as seen:
        model(**family.inputs())
    assert seen.count - own.count == base.config.num_hidden_layers
    with Generations() as again, INTERCEPTED:  # as a checkpoint does, which must be able to repeat one projection
        model(**family.inputs())
    assert again.count - own.count == 2 * base.config.num_hidden_layers


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "vit", "gpt2"])
def test_gradients_under_a_checkpoint_are_those_without(families, name, reentrant):
    family = families[name]
    expected = gradients(adapted(family).train(), family)
    model = adapted(family).train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.testing.assert_close(gradients(model, family), expected)


@pytest.fixture
def projections(model):
    attention = model.base_model.model.model.layers[0].self_attn
    return attention.q_proj, attention.v_proj


def test_what_a_projection_hands_to_the_next_is_taken_once(model, projections):
    q, v = projections
    x = torch.randn(1, 3, q.in_features)
    with during_call(model):
        before = q(x), v(x)
        scale(model)
        after = q(x), v(x)
    differ(before[1], after[1])
    agree(after[0], q(x))
    agree(after[1], v(x))


def test_a_projection_is_handed_nothing_that_was_made_from_lent_parameters(model, projections):
    q, v = projections
    x = torch.randn(1, 3, q.in_features)
    lent = {name: param.detach() * 1.2 for name, param in q.named_parameters() if "hora_hyper" in name}
    expected = v(x)
    with during_call(model):
        functional_call(q, lent, x)
        assert torch.equal(v(x), expected)
