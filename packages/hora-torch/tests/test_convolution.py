"""Convolutions with a kernel of one: linear maps of channels, in one group or several."""

import hora_spec
import hora_torch
import peft
import pytest
import torch
import transformers as tf
from hora_spec import HoraError
from hora_torch import HoraConfig
from torch import nn

from .conftest import TEXT, ids
from .oracle import agree, differ, evaluate

SMALL = {"r": 2, "hidden_dim": 6, "head_embed_dim": 5, "init_weights": False, "hora_alpha": 1.0}
CASES = {
    "1d": (lambda: nn.Conv1d(6, 8, 1), (2, 6, 5)),
    "2d": (lambda: nn.Conv2d(6, 8, 1, bias=False), (2, 6, 5, 4)),
    "3d": (lambda: nn.Conv3d(6, 8, 1), (2, 6, 3, 4, 2)),
    "strides": (lambda: nn.Conv2d(6, 8, 1, stride=(2, 3)), (2, 6, 5, 7)),
    "groups": (lambda: nn.Conv1d(6, 8, 1, groups=2), (2, 6, 5)),
    "groups of 2d": (lambda: nn.Conv2d(6, 9, 1, stride=2, groups=3), (2, 6, 5, 4)),
    "depthwise": (lambda: nn.Conv1d(6, 6, 1, groups=6), (2, 6, 5)),
    "no batch": (lambda: nn.Conv2d(6, 8, 1), (6, 5, 4)),
    "channels last": (lambda: nn.Conv2d(6, 8, 1).to(memory_format=torch.channels_last), (2, 6, 5, 4)),
}


def adapted(build, **kwargs):
    torch.manual_seed(0)
    config = HoraConfig(**SMALL | {"target_modules": ["0"]} | kwargs)
    return peft.get_peft_model(nn.Sequential(build()), config).eval()


@pytest.fixture(params=CASES)
def case(request):
    build, shape = CASES[request.param]
    return build, torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("heads", [None, "two or three"])
@pytest.mark.parametrize("sharing", ["full", "none"])
def test_the_branch_is_the_convolution_with_the_summed_weight(case, tmp_path, heads, sharing):
    build, x = case
    kwargs = {"sharing": sharing}
    if heads:
        kwargs["num_heads"] = 3 if build().out_channels % 3 == 0 else 2
    model = adapted(build, **kwargs)
    layer = model.base_model.model[0]
    base, actual = layer.get_base_layer(), model(x).detach()
    weight = base.weight.detach() + layer.get_delta_weight("default")
    agree(actual, torch.func.functional_call(base, {"weight": weight}, (x,)).detach())
    differ(actual, base(x).detach())
    before = base.weight.detach().clone()
    model.merge_adapter(safe_merge=True)
    agree(model(x).detach(), actual)
    model.unmerge_adapter()
    assert torch.equal(base.weight, before)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    agree(peft.PeftModel.from_pretrained(nn.Sequential(build()), tmp_path).eval()(x).detach(), actual)


def test_gradients_and_dropout_reach_every_group(case):
    build, x = case
    model = adapted(build, hora_dropout=0.5).train()
    x = x.requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None
    assert all(bool(param.grad.any()) for name, param in model.named_parameters() if "hora_hyper" in name)


@pytest.mark.parametrize("name", ["1d", "2d", "strides"])
def test_the_export_is_peft_s_lora_of_a_convolution(tmp_path, name):
    build, shape = CASES[name]
    model, x = adapted(build, num_heads=2), torch.randn(shape)
    hora_torch.export_lora(model, tmp_path)
    torch.manual_seed(0)
    lora = peft.PeftModel.from_pretrained(nn.Sequential(build()), tmp_path).eval()
    agree(lora(x).detach(), model(x).detach())
    with pytest.raises(HoraError, match="a convolution of 0"):
        hora_torch.export_lora(model, tmp_path / "server", for_server="vllm")


def test_an_export_of_groups_is_refused(tmp_path):
    with pytest.raises(HoraError, match="groups have one A in common"):
        hora_torch.export_lora(adapted(CASES["groups"][0]), tmp_path)


@pytest.mark.parametrize(
    "build", [lambda: nn.Conv1d(4, 4, 3), lambda: nn.Conv2d(4, 4, 1, padding=1), lambda: nn.Conv2d(4, 4, (1, 3))]
)
def test_other_kernels_are_refused_with_the_reason(build):
    with pytest.raises(HoraError, match=r"got Conv.d at '0': layouts have no axis for a wider kernel"):
        adapted(build)


def test_squeezebert_is_adapted_merged_and_saved_with_its_groups(tmp_path):
    def build():
        torch.manual_seed(0)
        return tf.SqueezeBertForSequenceClassification(
            tf.SqueezeBertConfig(**TEXT, embedding_size=32, initializer_range=0.5)
        ).eval()

    config = HoraConfig(**SMALL | {"target_modules": ["query", "value"]})
    model, inputs = peft.get_peft_model(build(), config).eval(), {"input_ids": ids()}
    assert build().transformer.encoder.layers[0].attention.query.groups == 4
    expected = evaluate(model, inputs)
    differ(expected, evaluate(build(), inputs))
    hora_torch.verify(model, inputs).require()
    model.save_pretrained(tmp_path)
    layer = next(iter(hora_spec.load_adapter(tmp_path).layers.values()))
    assert {p: (site.projection.num_heads, site.weight_shape) for p, site in layer.sites.items()} == {
        "q": (4, (32, 8, 1)),
        "v": (4, (32, 8, 1)),
    }
    agree(evaluate(peft.PeftModel.from_pretrained(build(), tmp_path), inputs), expected)
    agree(evaluate(model.merge_and_unload(), inputs), expected)


def test_each_sample_of_a_batch_gets_its_adapter():
    build, shape = CASES["groups of 2d"]
    model, x = adapted(build), torch.randn(shape)
    model.add_adapter("other", HoraConfig(**SMALL, target_modules=["0"]))
    mixed = model(x, adapter_names=["other", "__base__"])
    model.set_adapter("other")
    agree(mixed[:1].detach(), model(x[:1]).detach())
    with model.disable_adapter():
        agree(mixed[1:].detach(), model(x[1:]).detach())


@pytest.mark.parametrize("name", ["2d", "strides", "groups of 2d"])
def test_i7_a_joint_start_reads_what_the_kernel_sees(name):
    build, shape = CASES[name]
    torch.manual_seed(0)
    config = HoraConfig(r=2, sharing="a", a_source="fixed", target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(build()), config).eval()
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    start = hora_torch.joint_a(model, [batch], lambda model, x: model(x).square().sum())
    base = build()
    torch.manual_seed(0)
    base = build()
    base(batch).square().sum().backward()
    (name,) = start.params
    a = torch.from_numpy(next(iter(start.params[name].values())))
    rows = torch.linalg.svd(base.weight.grad.flatten(1), full_matrices=False).Vh[:2]
    torch.testing.assert_close(
        a / a.norm(dim=1, keepdim=True), rows * torch.sign((rows * a).sum(1, keepdim=True)), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_parts_of_a_fused_convolution_are_adapted_on_their_own_rows(groups):
    model = adapted(lambda: nn.Conv1d(6, 24, 1, groups=groups), row_order={"0": "q k v"}, num_heads=2, num_kv_heads=2)
    layer, x = model.base_model.model[0], torch.randn(2, 6, 5)
    base, actual = layer.get_base_layer(), model(x).detach()
    delta = layer.get_delta_weight("default")
    assert delta[:8].any()
    assert delta[16:].any()
    assert not delta[8:16].any()
    agree(actual, torch.func.functional_call(base, {"weight": base.weight.detach() + delta}, (x,)).detach())
    model.merge_adapter()
    agree(model(x).detach(), actual)


@pytest.mark.parametrize("name", ["2d", "strides", "groups of 2d"])
def test_i7_a_start_of_inputs_is_that_of_the_linear_map_of_all_positions(name):
    build, shape = CASES[name]
    base, x = build(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    seen = x[(..., *(slice(None, None, step) for step in base.stride))].movedim(1, -1).reshape(-1, 6 // base.groups)
    linear = nn.Linear(seen.shape[-1], base.out_channels)
    found = []
    for module, batch in ((base, x), (linear, seen)):
        config = HoraConfig(r=2, sharing="a", a_source="fixed", target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(module), config).eval()
        start = hora_torch.joint_a(model, [batch], lambda model, x: model(x).square().sum(), of="inputs")
        found += [torch.from_numpy(value) for params in start.params.values() for value in params.values()]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
