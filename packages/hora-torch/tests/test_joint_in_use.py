"""A joint start as users take it: real losses, batches and loops, saved and trained on; nothing wrong in silence."""

import itertools
import random

import hora_torch
import peft
import pytest
import torch
import transformers
from hora_spec import PRESETS, HoraError
from hora_torch import HoraConfig, joint_a
from torch import nn

from .test_joint import adapted, batches, first, loss, projector
from .test_training_state import PINNED, KillAfter, Killed

JOINT = PRESETS["joint"].fields


@pytest.fixture
def family(families):
    return families["llama"]


def values(start):
    return {(layer, key): a for layer, own in start.params.items() for key, a in own.items()}


def same(one, other, atol=0.0):
    one, other = values(one), values(other)
    assert one.keys() == other.keys()
    return max(abs(a - other[key]).max() for key, a in one.items()) <= atol


def spans_the_same(one, other, atol):
    one, other = values(one), values(other)
    return max(abs(projector(a) - projector(other[key])).max() for key, a in one.items()) <= atol


def started(family, data, loss=loss, **options):
    return joint_a(adapted(family), data, loss, **options)


@pytest.mark.parametrize("factor", [2.0**10, 2.0**-30], ids=["a sum", "tiny"])
def test_i7_the_size_of_the_loss_does_not_matter(family, factor):
    data = batches(family)
    assert same(started(family, data), started(family, data, lambda model, batch: factor * loss(model, batch)))


@pytest.mark.parametrize("factor", [1.0, 1e-5, 1e3])
def test_i7_gradients_in_float16_do_not_vanish(family, factor):
    """At 1e-5 those of a token are below the smallest number of float16."""

    def small(model, batch):
        tensor = first(model(**batch)).float()
        return factor * (tensor - torch.linspace(-1, 1, tensor.shape[-1])).square().mean()

    wide, narrow = adapted(family), adapted(family)
    narrow.get_base_model().half()
    assert spans_the_same(joint_a(wide, batches(family), small), joint_a(narrow, batches(family), small), 0.05)


def test_i7_batches_may_come_once(family):
    data = batches(family)
    assert same(started(family, data), started(family, (batch for batch in data)))
    assert same(started(family, data), started(family, iter(torch.utils.data.DataLoader(data, batch_size=None))))


def test_i7_batches_without_end_are_refused(family):
    with pytest.raises(HoraError, match=r"more than 256.*islice.*\(spec I7\)"):
        started(family, itertools.cycle(batches(family)))


def test_i7_what_a_loss_takes_out_of_a_batch_is_there_again(family):
    data = [batch | {"shift": torch.tensor(float(i))} for i, batch in enumerate(batches(family))]

    def taking(model, batch):
        shift = batch.pop("shift", 0.0)
        return (first(model(**batch)) - shift).square().mean()

    def reading(model, batch):
        return (first(model(input_ids=batch["input_ids"])) - batch["shift"]).square().mean()

    assert same(started(family, data, taking), started(family, data, reading))
    assert all("shift" in batch for batch in data)


def test_i7_passes_that_do_not_see_one_function_are_refused(family):
    model, draws = adapted(family), random.Random(0)
    modes = [module.training for module in model.modules()]
    with pytest.raises(HoraError, match=r"one function.*\(spec I7\)"):
        joint_a(model, batches(family), lambda model, batch: draws.uniform(1, 2) * loss(model, batch))

    def training(model, batch):
        torch.manual_seed(draws.randrange(1000))
        return (nn.functional.dropout(first(model.train()(**batch))) - 1).square().mean()

    with pytest.raises(HoraError, match="one function"):
        joint_a(model, batches(family), training)
    assert modes == [module.training for module in model.modules()]


def test_i7_noise_that_a_loss_draws_is_the_same_in_every_pass_and_drawn_from_nobody_else(family):
    """As diffusion models draw it."""
    data = batches(family)

    def noisy(model, batch):
        tensor = first(model(**batch))
        return (tensor - torch.randn_like(tensor)).square().mean()

    one, other = (started_without_drawing(family, data, noisy) for _ in range(2))
    assert same(one, other)


def started_without_drawing(family, data, loss):
    model = adapted(family)
    torch.manual_seed(6)
    before = torch.get_rng_state()
    start = joint_a(model, data, loss)
    assert torch.equal(torch.get_rng_state(), before)
    return start


@pytest.mark.parametrize(
    ("spoil", "got"),
    [
        (lambda value: value.detach(), "no gradient"),
        (lambda value: value.item(), "no gradient"),
        (lambda value: value.expand(2), r"shape \(2,\)"),
    ],
)
def test_i7_a_loss_that_cannot_be_differentiated_is_refused(family, spoil, got):
    model = adapted(family).train()
    with pytest.raises(HoraError, match=rf"one number.*got {got}.*\(spec I7\)"):
        joint_a(model, batches(family), lambda model, batch: spoil(loss(model, batch)))
    assert model.training


def padded(batch, width, side):
    """With arbitrary tokens as padding, which a mask leaves out."""
    (rows, length), fill = batch["input_ids"].shape, torch.randint(0, 64, (len(batch["input_ids"]), width))
    parts, masks = [batch["input_ids"], fill], [torch.ones(rows, length), torch.zeros(rows, width)]
    order = slice(None, None, 1 if side == "right" else -1)
    mask = torch.cat(masks[order], 1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": torch.cat(parts[order], 1), "attention_mask": mask, "position_ids": positions}


def of_tokens(model, batch):
    logits = model(**batch).logits
    counted = batch.get("attention_mask", torch.ones(logits.shape[:2])).bool()
    return (logits[counted] - torch.linspace(-1, 1, logits.shape[-1])).square().mean()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("options", [{}, {"of": "inputs"}, {"together": True}], ids=str)
def test_i7_padding_that_the_mask_leaves_out_counts_for_nothing(family, side, options):
    data = batches(family)
    plain = started(family, data, of_tokens, **options)
    assert same(plain, started(family, [padded(batch, 5, side) for batch in data], of_tokens, **options), atol=2e-3)


def test_i7_another_adapter_is_part_of_the_function_and_stays_as_it_is(family):
    model = adapted(family)
    model.add_adapter("other", HoraConfig(r=2, init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    before = {key: value.clone() for key, value in model.state_dict().items() if ".other." in key}
    flags = {name: param.requires_grad for name, param in model.named_parameters()}
    both = joint_a(model, batches(family), loss, adapter_name="default")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in before)
    assert flags == {name: param.requires_grad for name, param in model.named_parameters()}
    assert all(param.grad is None for param in model.parameters())
    assert not same(both, started(family, batches(family)), atol=1e-3)


def test_i7_a_start_inside_cached_factors_is_an_error_since_later_calls_would_not_see_it(family):
    model = adapted(family)
    with (
        pytest.raises(HoraError, match="inside cached_factors"),
        torch.no_grad(),
        hora_torch.cached_factors(model),
    ):
        joint_a(model, batches(family), loss)


def test_s6_a_fixed_a_has_32_bits_whatever_the_base_has(family):
    for kind in (torch.bfloat16, torch.float16):
        model = peft.get_peft_model(family.model().to(kind), HoraConfig(r=3, **JOINT))
        kept = {name: value.dtype for name, value in model.state_dict().items() if "hora_hyper" in name}
        assert {name: dtype for name, dtype in kept.items() if dtype != torch.float32} == {}


def test_i7_a_new_head_of_zeros_is_fitted_first_as_the_guide_says(families):
    family = families["timm-vit"]
    model = adapted(family, modules_to_save=["head"])
    data = [(torch.randn(8, 3, 32, 32), torch.arange(8) % 5) for _ in range(3)]

    def classified(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    with torch.no_grad():
        for name, param in model.named_parameters():
            if ".head." in name:
                param.zero_()
    with pytest.raises(HoraError, match="0 clear directions"):
        joint_a(model, data, classified)

    before, head = everything(model), [param for name, param in model.named_parameters() if "modules_to_save" in name]
    optimiser = torch.optim.AdamW(head, lr=1e-2)
    for batch in data:
        classified(model, batch).backward()
        optimiser.step()
        model.zero_grad()
    assert equal(everything(model), before)
    joint_a(model, data, classified)


def trainer(family, path, *callbacks, start=True, **arguments):
    model = peft.get_peft_model(family.model(), HoraConfig(r=3, **JOINT))
    rows = torch.randint(0, 64, (24, 6), generator=torch.Generator().manual_seed(2))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2} | arguments
    made = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(path), logging_steps=1, weight_decay=0.5, report_to="none", disable_tqdm=True, use_cpu=True, **arguments
        ),
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=list(callbacks),
    )
    if start:
        joint_a(model, itertools.islice(made.get_train_dataloader(), 3))
    return made


def fixed(model):
    return {key: value.clone() for key, value in model.state_dict().items() if "hora_hyper" in key and ".a." in key}


def everything(model):
    return {key: value.clone() for key, value in model.state_dict().items() if "hora_hyper" in key}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@PINNED
@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}],
    ids=["plain", "accumulated", "bf16"],
)
def test_the_trainer_leaves_a_fixed_joint_a_alone(family, tmp_path, arguments):
    made = trainer(family, tmp_path, **arguments)
    before = everything(made.model)
    made.train()
    after = everything(made.model)
    assert equal(fixed(made.model), {key: value for key, value in before.items() if ".a." in key})
    assert all(not torch.equal(value, before[key]) for key, value in after.items() if ".a." not in key)


@PINNED
@pytest.mark.parametrize("start", [True, False], ids=["started again", "not started again"])
def test_a_resumed_trainer_has_the_a_of_its_checkpoint(family, tmp_path, start):
    whole = trainer(family, tmp_path / "whole")
    whole.train()
    killed = trainer(family, tmp_path / "killed", KillAfter(5))
    with pytest.raises(Killed):
        killed.train()
    resumed = trainer(family, tmp_path / "killed", start=start)
    resumed.train(resume_from_checkpoint=True)
    assert equal(everything(resumed.model), everything(whole.model))


@PINNED
def test_the_best_checkpoint_comes_back_with_its_a(family, tmp_path):
    made = trainer(
        family,
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        learning_rate=0.5,
    )
    a = fixed(made.model)
    made.train()
    best = peft.PeftModel.from_pretrained(family.model(), made.state.best_model_checkpoint)
    assert equal(everything(made.model), everything(best))
    assert equal(fixed(best), a)


def test_saved_reloaded_and_trained_on_is_trained_at_a_stretch(family, tmp_path):
    def steps(model, count):
        optimiser = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1)
        for _ in range(count):
            loss(model, family.inputs()).backward()
            optimiser.step()
            optimiser.zero_grad()

    whole, parted = adapted(family), adapted(family)
    for model in (whole, parted):
        joint_a(model, batches(family), loss)
    steps(whole, 4)
    steps(parted, 2)
    parted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(family.model(), tmp_path, is_trainable=True)
    steps(again, 2)
    assert equal(everything(again), everything(whole))
