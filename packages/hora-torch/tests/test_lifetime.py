"""Whatever wrote to a parameter, and however the adapter is used next, its update is that of the present parameters."""

import warnings

import hora_torch
import numpy as np
import peft
import pytest
import torch
import transformers

from .oracle import adapted, agree, current, differ, evaluate, output, parameters, truth

LR = 0.05


def optional(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that look for accelerators
        return pytest.importorskip(name, reason=f"{name} is optional: one of the optimisers that people use")


def trained(model, family):
    """Parameters of the adapter, with the gradients of a loss."""
    params = list(parameters(model).values())
    model.zero_grad()
    output(model.train()(**family.inputs())).square().mean().backward()
    model.eval()
    return params


def by(make):
    """One step of an optimiser that `make` builds."""

    def start(model, family):
        optimizer = make([*parameters(model).values()])

        def step():
            trained(model, family)
            optimizer.step()

        return step

    return start


def of(library, make):
    """As `by`, with a library that may be missing."""
    return lambda model, family: by(lambda params: make(optional(library), params))(model, family)


def textbook(model, family):
    def step():
        for param in trained(model, family):
            param.data -= LR * param.grad.sign()

    return step


def averaged(model, family):
    """Swaps to the mean of past parameters and back, as for an evaluation between steps."""
    params = list(parameters(model).values())
    ema = optional("diffusers.training_utils").EMAModel(params, min_decay=0.5)
    ema.step(params)  # its first step copies
    by(lambda params: torch.optim.AdamW(params, lr=4 * LR))(model, family)()
    ema.step(params)

    def swap():
        if ema.temp_stored_params is None:
            ema.store(params)
            ema.copy_to(params)
        else:
            ema.restore(params)

    return swap


def flat(model, family):
    params = list(parameters(model).values())
    buffer = torch.cat([param.detach().flatten() for param in params])
    for param, part in zip(params, buffer.split([param.numel() for param in params]), strict=True):
        param.data = part.view_as(param)
    return lambda: buffer.mul_(1.1)


def through_numpy(model, family):
    arrays = [param.detach().numpy() for param in parameters(model).values()]

    def scale():
        for array in arrays:
            array *= 1.1

    return scale


def assigned(model, family):
    """New tensors at the addresses of the old ones."""
    names = {id(param): name for name, param in model.named_parameters()}
    state = {names[id(param)]: param.detach().numpy() for param in parameters(model).values()}

    def assign():
        for array in state.values():
            np.multiply(array, 1.1, out=array)
        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
        model.load_state_dict(tensors, strict=False, assign=True)

    return assign


UPDATES = {
    "AdamW, foreach": by(lambda params: torch.optim.AdamW(params, lr=LR, foreach=True)),
    "AdamW, one by one": by(lambda params: torch.optim.AdamW(params, lr=LR, foreach=False)),
    "AdamW, fused": by(lambda params: torch.optim.AdamW(params, lr=LR, fused=True)),
    "Adam, fused": by(lambda params: torch.optim.Adam(params, lr=LR, fused=True)),
    "SGD, fused": by(lambda params: torch.optim.SGD(params, lr=20 * LR, fused=True)),
    "Adagrad, fused": by(lambda params: torch.optim.Adagrad(params, lr=LR, fused=True)),
    "AdamW of bitsandbytes": of("bitsandbytes", lambda bnb, params: bnb.optim.AdamW(params, lr=LR)),
    "AdamW8bit": of("bitsandbytes", lambda bnb, params: bnb.optim.AdamW8bit(params, lr=LR, min_8bit_size=1)),
    "Prodigy": of("prodigyopt", lambda prodigy, params: prodigy.Prodigy(params, d0=LR)),
    "Adafactor": by(lambda params: transformers.Adafactor(params, lr=LR, relative_step=False, scale_parameter=False)),
    "textbook SGD": textbook,
    "EMA of diffusers": averaged,
    "a flat buffer": flat,
    "NumPy": through_numpy,
    "load_state_dict": assigned,
}


def evaluated(model, family, path):
    return evaluate(model, family.inputs())


def inferred(model, family, path):
    with torch.inference_mode():
        return output(model(**family.inputs())).clone()


def generated(model, family, path):
    """Logits of the first new token; `truth` has them in its last row."""
    inputs = family.inputs()
    mask = torch.ones_like(inputs["input_ids"])
    asked = {"max_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    return model.generate(**inputs, attention_mask=mask, do_sample=False, **asked).logits[0]


def merged_in_place(model, family, path):
    model.merge_adapter()
    try:
        return evaluate(model, family.inputs())
    finally:
        model.unmerge_adapter()


def merged_and_unloaded(model, family, path):
    return evaluate(model.merge_and_unload(), family.inputs())


def reloaded(model, family, path):
    model.save_pretrained(path)
    return evaluate(peft.PeftModel.from_pretrained(family.model(), path), family.inputs())


def exported(model, family, path):
    hora_torch.export_lora(model, path)
    lora = peft.PeftModel.from_pretrained(family.model(), path)
    assert lora.peft_type == peft.PeftType.LORA
    return evaluate(lora, family.inputs())


USES = [evaluated, inferred, generated, merged_in_place, merged_and_unloaded, reloaded, exported]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("update", UPDATES)
def test_every_use_knows_what_every_update_left(families, update, use, tmp_path):
    family = families["llama"]
    model = adapted(family)
    step = UPDATES[update](model, family)
    step()  # what is written once only may look like a first use
    before = truth(family, current(model))
    agree(evaluate(model, family.inputs()), before)
    if use is not merged_and_unloaded:  # which needs the model whole
        use(model, family, tmp_path / "before")
    step()
    expected = truth(family, current(model))
    last = (lambda logits: logits[:, -1]) if use is generated else (lambda logits: logits)
    differ(last(before), last(expected))
    agree(use(model, family, tmp_path / "after"), last(expected))


@pytest.mark.parametrize("name", ["vit", "gpt2", "t5", "timm-vit", "mha", "mha-cross"])
def test_every_kind_of_layer_knows_what_an_update_left(families, name):
    family = families[name]
    model = adapted(family)
    before = truth(family, current(model))
    agree(evaluate(model, family.inputs()), before)
    for param in parameters(model).values():
        param.data *= 1.2
    expected = truth(family, current(model))
    differ(before, expected)
    agree(evaluate(model, family.inputs()), expected)
    agree(merged_in_place(model, family, None), expected)
