"""The joint start of A on real modules, against gradients of the weights that are formed whole."""

import hora_torch
import numpy as np
import peft
import pytest
import torch
from hora_spec import PRESETS, HoraError
from hora_torch import HoraConfig, joint_a
from hora_torch.layer import HoraLayer

JOINT = {"r": 3, **PRESETS["joint"].fields}
FAMILIES = ["llama", "gpt2", "timm-vit", "mha"]


def batches(family, count=3):
    torch.manual_seed(3)
    found = []
    for _ in range(count):
        inputs = family.inputs()
        found.append(
            {k: torch.randn_like(v) if v.is_floating_point() else torch.randint_like(v, 64) for k, v in inputs.items()}
        )
    return found


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def loss(model, batch):
    tensor = first(model(**batch))
    target = torch.linspace(-1, 1, tensor.shape[-1])
    return (tensor - target).square().mean()


def adapted(family, **kwargs):
    return peft.get_peft_model(family.model(), HoraConfig(**(JOINT | kwargs)))


def weight_gradients(family, adapter):
    """Canonical mean gradients of the base's own weights, by plain differentiation: layer to projection to array."""
    model = family.model()
    sites = {name: layer.sites for name, layer in adapter.layers.items()}
    stored = {
        (site.module, site.parameter): getattr(model.get_submodule(site.module), site.parameter)
        for own in sites.values()
        for site in own.values()
    }
    for weight in stored.values():
        weight.requires_grad_()
    data = batches(family)
    grads = torch.autograd.grad(sum(loss(model, batch) for batch in data) / len(data), list(stored.values()))
    grads = dict(zip(stored, (grad.double().numpy() for grad in grads), strict=True))
    return {
        name: {p: site.layout.read(grads[site.module, site.parameter]) for p, site in own.items()}
        for name, own in sites.items()
    }


def projector(rows):
    basis = np.linalg.qr(np.asarray(rows, np.float64).T)[0]
    return basis @ basis.T


def overlap(a, matrix):
    """Part of the matrix's energy that the first right singular vectors hold, that the rows of a hold as well."""
    best = (np.linalg.svd(matrix, compute_uv=False)[: len(a)] ** 2).sum()
    return (matrix @ projector(a) * matrix).sum() / best


@pytest.fixture(params=FAMILIES)
def family(request, families):
    return families[request.param]


def test_i7_a_spans_what_plain_differentiation_finds(family):
    model = adapted(family)
    start = joint_a(model, batches(family), loss, power=2)
    adapter = hora_torch.to_adapter(model)
    for name, grads in weight_gradients(family, adapter).items():
        for p, grad in grads.items():
            written = adapter.layers[name].params[f"a.{p}"]
            np.testing.assert_array_equal(written, start.params[name][f"a.{p}"])
            assert overlap(written, grad) == pytest.approx(1, abs=1e-3)
            spectrum = np.linalg.svd(grad, compute_uv=False)
            np.testing.assert_allclose(start.spectra[name][f"a.{p}"][:3], spectrum[:3], rtol=2e-2)


def test_i7_the_start_still_leaves_the_base_unchanged(family):
    model, inputs = adapted(family).eval(), family.inputs()
    with torch.no_grad():
        expected = model(**inputs)
        joint_a(model, batches(family), loss)
        got = model(**inputs)
    torch.testing.assert_close(first(got), first(expected), rtol=0, atol=0)


def test_i7_the_scale_makes_a_read_as_strongly_as_lora_s(families):
    family = families["llama"]
    model, seen = adapted(family), []
    joint_a(model, batches(family), loss)
    layer = next(module for module in model.modules() if isinstance(module, HoraLayer))
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    for batch in batches(family):
        model(**batch)
    x, a = torch.cat(seen), layer.hora_hyper["default"].params()["a.q"]
    assert (x @ a.mT).square().sum(1).mean() == pytest.approx(float(3 * x.square().sum(1).mean() / (3 * 32)), rel=1e-4)


@pytest.mark.parametrize("fields", [{"tie_a": True}, {"a_source": "direct"}, {"sharing": "full"}], ids=str)
def test_i7_any_shared_a_may_start_so(families, fields):
    family = families["llama"]
    model = adapted(family, **fields)
    start = joint_a(model, batches(family), loss, together=True)
    for own in start.params.values():
        assert len({a.tobytes() for a in own.values()}) == 1


def test_i7_of_inputs_no_backward_pass_is_needed(families):
    family = families["llama"]
    model = adapted(family)

    def forbidden(model, batch):
        assert not torch.is_grad_enabled()
        return loss(model, batch)

    start = joint_a(model, batches(family), forbidden, of="inputs")
    for own in start.params.values():  # q and v read the same
        np.testing.assert_allclose(projector(own["a.q"]), projector(own["a.v"]), atol=1e-3)


def test_nothing_else_is_touched(families):
    family = families["llama"]
    model = adapted(family, modules_to_save=["lm_head"]).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    joint_a(model, batches(family), loss)
    assert model.training
    assert all(param.grad is None for param in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules() if isinstance(module, HoraLayer))
    changed = {
        key.rpartition("hora_hyper.")[2] for key, value in model.state_dict().items() if (value != before[key]).any()
    }
    assert changed == {"default.a.q", "default.a.v"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: next(p for n, p in model.named_parameters() if ".b.q" in n).data.add_(1), "before training"),
        (lambda model: model.base_model.disable_adapter_layers(), "not active"),
        (lambda model: model.merge_adapter(), "merged"),
        (lambda model: next(m for m in model.modules() if isinstance(m, HoraLayer)).set_scale("default", 2), "unscale"),
    ],
)
def test_i7_an_adapter_that_is_in_use_is_refused(families, spoil, message):
    model = adapted(families["llama"])
    spoil(model)
    with pytest.raises(HoraError, match=rf"{message}.*\(spec I7\)"):
        joint_a(model, batches(families["llama"]), loss)


def test_i7_no_batches_no_start(families):
    with pytest.raises(HoraError, match=r"got none \(spec I7\)"):
        joint_a(adapted(families["llama"]), [], loss)


def test_a_batch_without_a_loss_is_answered(families):
    with pytest.raises(HoraError, match="pass loss="):
        joint_a(adapted(families["llama"]), batches(families["llama"]))


def test_the_models_own_loss_is_the_default(families):
    family = families["llama"]
    data = [batch | {"labels": batch["input_ids"]} for batch in batches(family)]
    one, other = adapted(family), adapted(family)
    named = joint_a(one, data, lambda model, batch: model(**batch).loss).params
    for name, own in joint_a(other, data).params.items():
        np.testing.assert_array_equal(own["a.q"], named[name]["a.q"])


def test_i7_dropout_of_the_adapter_is_off_while_it_measures_and_on_afterwards(families):
    family = families["llama"]
    plain, dropping = adapted(family), adapted(family, hora_dropout=0.5).train()
    exact = joint_a(plain, batches(family), loss).params
    for name, own in joint_a(dropping, batches(family), loss).params.items():
        np.testing.assert_array_equal(own["a.q"], exact[name]["a.q"])
    assert all(module.training for module in dropping.modules())


def test_i7_what_is_measured_does_not_depend_on_the_scaling(families):
    family = families["llama"]
    one, other = (joint_a(adapted(family, hora_alpha=alpha), batches(family), loss) for alpha in (3.0, 12.0))
    for name, own in one.spectra.items():
        np.testing.assert_allclose(own["a.q"], other.spectra[name]["a.q"], rtol=1e-4)


def of_the_first_layer(model, batch):
    return model(**batch, output_hidden_states=True).hidden_states[1].square().mean()


def of_no_layer(model, batch):
    return model.get_input_embeddings()(batch["input_ids"]).square().mean()


def without_end(model, batch):
    return torch.inf * loss(model, batch)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (of_the_first_layer, {}, "clear directions"),
        (of_no_layer, {"of": "inputs"}, "calls every adapted layer, got none of 'q'"),
        (without_end, {}, "finite"),
    ],
)
def test_i7_a_layer_that_the_loss_tells_nothing_about_is_answered(families, loss, options, message):
    with pytest.raises(HoraError, match=rf"{message}.*\(spec I7\)"):
        joint_a(adapted(families["llama"], r=1), batches(families["llama"])[:1], loss, **options)


def test_a_failure_changes_nothing(families):
    family = families["llama"]
    model = adapted(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(HoraError, match="clear directions"):
        joint_a(model, batches(family), lambda model, batch: 0 * loss(model, batch))
    assert all((value == before[key]).all() for key, value in model.state_dict().items())
