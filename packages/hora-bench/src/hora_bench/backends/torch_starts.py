"""Starts of A from examples: ours through the adapter, those of PEFT as it documents them."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

Examples = Sequence[dict[str, torch.Tensor]]
Loss = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]


def joint(model: nn.Module, start: Mapping[str, Any], examples: Examples, loss: Loss) -> None:
    """A of all layers where the loss on the examples wants all heads to read."""
    import hora_torch

    asked = {key: value for key, value in start.items() if key != "batches"}
    hora_torch.joint_a(model, examples, loss, **asked)


def eva_config(rho: float) -> dict[str, Any]:
    """Of PEFT's EVA: whitened, which its documentation recommends for vision, ranks up to `rho` times as large."""
    import peft

    return {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(whiten=True, rho=rho)}


def eva(model: nn.Module, examples: Examples, loss: Loss) -> None:
    """PEFT's EVA; the first pass finds which layers have equal inputs, the next are repeated until it converges."""
    import peft

    peft.initialize_lora_eva_weights(
        model,
        list(examples),
        forward_fn=loss,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )


def lora_ga_config() -> dict[str, Any]:
    """Of PEFT's LoRA-GA with its defaults, which are what it recommends."""
    from peft.tuners.lora import LoraGAConfig

    return {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}


def lora_ga(model: nn.Module, config: Any, examples: Examples, loss: Loss) -> None:
    """PEFT's LoRA-GA before injection: it keeps a dense gradient of every adapted weight for it."""
    from peft.tuners.lora.loraga import preprocess_loraga

    def passes() -> None:
        for batch in examples:
            loss(model, batch).backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a hook sees that the images need no gradient
        preprocess_loraga(model, config, passes)


def changes_base(model: nn.Module) -> bool:
    """Whether the base is another since the start: an adapter for it would be wrong on the checkpoint."""
    configs = getattr(model, "peft_config", {}).values()
    return any(getattr(config, "init_lora_weights", None) == "lora_ga" for config in configs)
