"""What is asked of one quantised base, of HoRA and of the LoRA that adds the same update."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from bases import floats, inputs, load
from hora_spec import HoraError
from hora_torch import HoraConfig, export_lora
from hora_torch.layer import HoraLayer
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

UPDATE = 0.05
"""Norm of the update relative to that of the weight, as of an adapter that was trained."""

Answer = float | bool | str


def examine(name: str, folder: Path) -> dict[str, dict[str, Answer]]:
    """Answers of both methods by question; numbers are parts of the update."""
    with tempfile.TemporaryDirectory() as lora:

        def hora_model() -> PeftModel:
            return adapted(load(name, folder))

        def lora_model() -> PeftModel:
            return _lora(load(name, folder), lora)

        export_lora(hora_model(), lora)
        return {
            "hora": {
                "train": _answer(lambda: gradients_differ(hora_model(), adapted(in_floats(name, folder)))),
                **_merging(hora_model),
                "save": _answer(lambda: saved_and_loaded(hora_model(), load(name, folder))),
                "export": _answer(lambda: effects_differ(hora_model(), lora_model(), load(name, folder))),
            },
            "lora": {
                "train": _answer(lambda: gradients_differ(lora_model(), _lora(in_floats(name, folder), lora))),
                **_merging(lora_model),
                "save": _answer(lambda: saved_and_loaded(lora_model(), load(name, folder))),
            },
        }


class UnknownError(Exception):
    """PEFT's LoRA does not adapt this class."""


def _lora(base: nn.Module, directory: str) -> PeftModel:
    try:
        return PeftModel.from_pretrained(base, directory, is_trainable=True).eval()
    except ValueError as error:
        raise UnknownError(str(error)) from error


def adapted(model: nn.Module) -> PeftModel:
    """A model with an adapter whose update has the norm `UPDATE` in each layer."""
    torch.manual_seed(0)
    model = get_peft_model(model, HoraConfig(r=4, hidden_dim=8, head_embed_dim=8, init_weights=False)).eval()
    for layer in (module for module in model.modules() if isinstance(module, HoraLayer)):
        hypernet = layer.hypernet("default")
        for role in layer.hora_attached["default"].sites:
            delta, weight = layer.get_delta_weight("default"), multiplies_with(layer.get_base_layer())
            for key in ("b_out", "b"):
                if f"{key}.{role}" in hypernet.params():
                    hypernet.params()[f"{key}.{role}"].data *= UPDATE * weight.norm() / delta.norm()
    return model


def in_floats(name: str, folder: Path) -> nn.Module:
    """A float model with the weights that the base multiplies with."""
    plain, base = floats(folder), load(name, folder)
    for path, module in plain.named_modules():
        if path.endswith("proj"):
            module.weight.data = multiplies_with(base.get_submodule(path))
    return plain


def multiplies_with(linear: nn.Module) -> Tensor:
    """The weight of a linear map in floats, found by multiplying."""
    training = linear.training
    linear.train()  # in evaluation bitsandbytes rounds inputs
    with torch.no_grad():
        product = linear(torch.eye(linear.in_features))
    linear.train(training)
    return (product if linear.bias is None else product - linear.bias).T.float().contiguous()


def run(model: nn.Module) -> Tensor:
    """Outputs without gradients."""
    with torch.no_grad():
        return model.eval()(**inputs()).logits


def gradients_differ(model: PeftModel, expected: PeftModel) -> float:
    """The largest difference relative to the largest gradient."""
    one, other = gradients(model), gradients(expected)
    scale = max(float(grad.abs().max()) for grad in other.values())
    return max(float((one[key] - other[key]).abs().max()) for key in other) / scale


def gradients(model: PeftModel) -> dict[str, Tensor]:
    """Of every trainable parameter."""
    model.train()(**inputs()).logits.square().sum().backward()
    return {name: param.grad for name, param in model.named_parameters() if param.requires_grad}


def merging(make: Callable[[], PeftModel]) -> dict[str, Answer]:
    """What merging loses, and by how much the weight differs after unmerging; the worst layer."""
    model = make()
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [multiplies_with(layer.get_base_layer()) for layer in layers]
    deltas = [layer.get_delta_weight("default").float() for layer in layers]

    def away(wanted: list[Tensor]) -> float:
        found = [multiplies_with(layer.get_base_layer()) for layer in layers]
        return max(
            float((one - other).norm() / delta.norm()) for one, other, delta in zip(found, wanted, deltas, strict=True)
        )

    def merge() -> float:
        model.merge_adapter()
        return away([weight + delta for weight, delta in zip(before, deltas, strict=True)])

    def unmerge() -> float:
        model.unmerge_adapter()
        return away(before)

    answers = {"merge": _answer(merge)}
    return answers if isinstance(answers["merge"], str) else answers | {"unmerge": _answer(unmerge)}


def saved_and_loaded(model: PeftModel, base: nn.Module) -> bool:
    """Whether the adapter computes the same on a fresh base."""
    expected = run(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return torch.equal(run(PeftModel.from_pretrained(base, folder)), expected)


def effects_differ(model: PeftModel, other: PeftModel, base: nn.Module) -> float:
    """How far apart what two adapters change in the outputs is."""
    plain, one = run(base), run(model)
    return float((run(other) - one).norm() / (one - plain).norm())


def _merging(make: Callable[[], PeftModel]) -> dict[str, Answer]:
    try:
        return merging(make)
    except UnknownError:
        return {"merge": "not adapted"}


def _answer(ask: Callable[[], Answer]) -> Answer:
    try:
        return ask()
    except HoraError as error:
        return f"refused: {error}"
    except UnknownError:
        return "not adapted"
    except Exception as error:  # of whatever library: it becomes a cell of the table
        return f"error: {type(error).__name__}: {error}"[:300]
