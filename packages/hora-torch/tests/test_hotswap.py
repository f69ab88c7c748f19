"""PEFT's hotswap: the values of another adapter, in place, or nothing at all."""

import hora_torch
import peft
import pytest
import torch
from hora_spec import HoraError
from hora_torch import HoraConfig
from hora_torch.hotswap import swap
from peft.utils.hotswap import hotswap_adapter

from .oracle import assert_unchanged, snapshot

SMALL = {"r": 2, "hidden_dim": 6, "head_embed_dim": 5, "init_weights": False}
FITTING = {
    "the same": {},
    "a smaller rank": {"r": 1, "hora_alpha": 3.0},
    "another hypernetwork": {"a_source": "hypernetwork", "hidden_dim": 3, "activation": "tanh"},
    "free factors": {"sharing": "a", "hora_alpha": 1.0},
    "fewer projections": {"target_modules": ["q_proj"]},
    "one layer": {"target_modules": r".*layers\.1\.self_attn\.[qv]_proj"},
}
NOT_FITTING = {
    "a larger rank": ({"r": 3}, "at least its rank, got 3"),
    "more projections": ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "at least its rank, got 2"),
    "A per head": ({"sharing": "none"}, "free factors"),
    "modules trained whole": ({"modules_to_save": ["lm_head"]}, "can be swapped, got also"),
}
UNSOUND = {
    "values that are not finite": (lambda key, tensors: tensors[key].fill_(torch.inf), "finite"),
    "codes": (lambda key, tensors: tensors.update({key: tensors[key].int()}), "floating"),
    "too few values": (lambda key, tensors: tensors.pop(key), "b_in"),
}


@pytest.fixture(params=["llama", "gpt2"])
def family(request, families):
    return families[request.param]


@pytest.fixture
def llama(families):
    return families["llama"]


def adapted(family, draw=0, **kwargs):
    base = family.model()
    torch.manual_seed(draw)
    return peft.get_peft_model(base, HoraConfig(**SMALL | kwargs, seed=draw)).eval()


def logits(model, family):
    with torch.no_grad():
        return model(**family.inputs()).logits


def test_adapters_of_equal_layers_exchange_their_parameters(family, tmp_path):
    other = adapted(family, 1)
    other.save_pretrained(tmp_path)
    model = adapted(family)
    params = dict(model.named_parameters())
    assert not torch.equal(logits(model, family), logits(other, family))
    hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(logits(model, family), logits(other, family))
    assert all(param is params[name] for name, param in model.named_parameters())
    model.save_pretrained(tmp_path / "again")
    loaded = peft.PeftModel.from_pretrained(family.model(), tmp_path / "again").eval()
    assert torch.equal(logits(loaded, family), logits(other, family))


def test_an_adapter_that_awaits_its_values_may_get_them_by_a_swap(llama, tmp_path):
    """A slot that a config describes, before any values were loaded."""
    other = adapted(llama, 1)
    other.save_pretrained(tmp_path)
    config = HoraConfig.from_pretrained(tmp_path)
    model = peft.get_peft_model(llama.model(), config).eval()
    tensors, config = read(tmp_path)
    swap(model, tensors, "default", config)
    assert torch.equal(logits(model, llama), logits(other, llama))


def test_nothing_is_left_of_what_was_swapped_before(llama, tmp_path):
    model, third = adapted(llama), adapted(llama, 2, r=1)
    hora_torch.freeze(model)
    adapted(llama, 1).save_pretrained(tmp_path / "second")
    third.save_pretrained(tmp_path / "third")
    for name in ("second", "third"):
        hotswap_adapter(model, tmp_path / name, "default")
    torch.testing.assert_close(logits(model, llama), logits(third, llama), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FITTING)
def test_a_frozen_adapter_takes_the_factors_of_any_that_fits(llama, tmp_path, kind):
    other = adapted(llama, 1, **FITTING[kind])
    other.save_pretrained(tmp_path)
    model = adapted(llama, hora_alpha=5.0)
    hora_torch.freeze(model)
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(logits(model, llama), logits(other, llama), rtol=1e-4, atol=1e-5)


def test_a_slot_with_an_a_per_head_takes_one_for_all(llama, tmp_path):
    other = adapted(llama, 1)
    other.save_pretrained(tmp_path)
    model = adapted(llama, sharing="none")
    hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(logits(model, llama), logits(other, llama), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", NOT_FITTING)
def test_what_does_not_fit_is_refused_and_nothing_changes(llama, tmp_path, kind):
    kwargs, message = NOT_FITTING[kind]
    adapted(llama, **kwargs).save_pretrained(tmp_path)
    model = adapted(llama)
    hora_torch.freeze(model)
    before = snapshot(model)
    with pytest.raises(HoraError, match=message):
        hotswap_adapter(model, tmp_path, "default")
    assert_unchanged(model, before)


def read(directory):
    """Tensors by their keys in a model, and the config, as by somebody who checks nothing."""
    tensors = peft.load_peft_weights(str(directory))
    config = HoraConfig.from_pretrained(directory)
    return {key.replace(".hora_hyper.", ".hora_hyper.default."): value for key, value in tensors.items()}, config


@pytest.mark.parametrize("kind", UNSOUND)
@pytest.mark.parametrize("digested", [True, False])
def test_an_unsound_adapter_is_refused_and_nothing_changes(llama, tmp_path, kind, digested):
    edit, message = UNSOUND[kind]
    adapted(llama, 1).save_pretrained(tmp_path)
    tensors, config = read(tmp_path)
    if not digested:
        config.hora_tensors_sha256 = None
    edit(next(key for key in tensors if key.endswith("b_in")), tensors)
    model = adapted(llama)
    before = snapshot(model)
    with pytest.raises(HoraError, match="sha256|floating" if digested else message):
        swap(model, tensors, "default", config)
    assert_unchanged(model, before)


def test_an_adapter_that_does_not_say_what_it_is_is_refused(llama, tmp_path):
    adapted(llama, 1).save_pretrained(tmp_path)
    tensors, config = read(tmp_path)
    config.hora_layers = None
    model = adapted(llama)
    with pytest.raises(HoraError, match="describes its layers"):
        swap(model, tensors, "default", config)


@pytest.mark.parametrize(
    "slot",
    [{}, {"sharing": "a", "tie_a": True}, {"residual": True, "gate": 1.0}, {"a_source": "fixed"}],
    ids=["generated", "one A for all", "gated", "fixed"],
)
def test_what_has_no_free_factors_takes_no_other_spec(llama, tmp_path, slot):
    adapted(llama, activation="tanh").save_pretrained(tmp_path)
    model = adapted(llama, **slot)
    before = snapshot(model)
    with pytest.raises(HoraError, match=r"hora_torch\.freeze"):
        hotswap_adapter(model, tmp_path, "default")
    assert_unchanged(model, before)


def test_a_merged_adapter_is_not_swapped(llama, tmp_path):
    model = adapted(llama)
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(HoraError, match="unmerge it first"):
        hotswap_adapter(model, tmp_path, "default")


def test_a_swap_compiles_nothing_anew(llama, tmp_path):
    other = adapted(llama, 1)
    other.save_pretrained(tmp_path)
    model = adapted(llama)
    compiled, inputs = torch.compile(model, backend="eager"), llama.inputs()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled(**inputs)
        hotswap_adapter(compiled, tmp_path, "default")
        swapped = compiled(**inputs).logits
    torch.testing.assert_close(swapped, logits(other, llama), rtol=1e-5, atol=1e-6)


def test_exports_are_swapped_as_plain_lora(llama, tmp_path):
    """A server that knows LoRA alone: the exports of two adapters of one config take each other's place."""
    adapters = [adapted(llama, draw) for draw in range(2)]
    for number, model in enumerate(adapters):
        hora_torch.export_lora(model, tmp_path / str(number))
    model = peft.PeftModel.from_pretrained(llama.model(), tmp_path / "0").eval()
    hotswap_adapter(model, tmp_path / "1", "default")
    torch.testing.assert_close(logits(model, llama), logits(adapters[1], llama), rtol=1e-4, atol=1e-5)
