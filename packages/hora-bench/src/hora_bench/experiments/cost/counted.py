"""The costs as frameworks count them, on abstract shapes: whole models by torch, projections of a layer by XLA."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import torch
from hora_jax.functional import factors, hora_linear
from hora_spec import AdapterSpec, LayerShape, param_shapes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hora_bench.experiments.cost.architectures import Transformer, Workload
from hora_bench.experiments.cost.formulas import Macs, Method, Route
from hora_bench.torchvision_ops import declare_missing_ops

if TYPE_CHECKING:  # imported where they are used, after the missing operators
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

TARGETS = ["q_proj", "v_proj"]


def _addmm(_: torch.Size, left: torch.Size, right: torch.Size, **__: Any) -> int:
    """FLOPs of ``y += left @ right``: torch's counter (2.13) knows addmm but not the in-place addmm_ of hora-torch."""
    return 2 * left.numel() * right[1]


def counter() -> FlopCounterMode:
    """The one counter of floating-point operations on torch: those of the matrix products inside its context."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm})


def build(model: Transformer) -> PreTrainedModel:
    """The transformers model on the meta device, frozen; attention as plain products, which the counter sees."""
    declare_missing_ops()
    from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

    widths = {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_dim,
        "attn_implementation": "eager",
    }
    with torch.device("meta"):
        if model.vocab_size:
            heads = {"num_key_value_heads": model.num_kv_heads, "vocab_size": model.vocab_size}
            return LlamaForCausalLM(LlamaConfig(**widths, **heads)).requires_grad_(False)
        return ViTModel(ViTConfig(**widths), add_pooling_layer=False).requires_grad_(False)


def config(method: Method, route: Route = "branch") -> PeftConfig:
    """PEFT's configuration of a method on Q and V."""
    declare_missing_ops()
    from hora_torch import HoraConfig
    from peft import LoraConfig, VeraConfig

    if isinstance(method, AdapterSpec):
        fields = method.to_dict()
        rank, alpha = fields.pop("rank"), fields.pop("alpha")
        return HoraConfig(r=rank, hora_alpha=alpha, target_modules=TARGETS, route=route, **fields)
    if method.name == "vera":
        return VeraConfig(r=method.rank, target_modules=TARGETS)
    return LoraConfig(r=method.rank, target_modules=TARGETS, use_dora=method.name == "dora")


@contextmanager
def adapted(base: PreTrainedModel, method: Method, route: Route = "branch") -> Generator[PeftModel]:
    """`base` with a method's adapter on Q and V; afterwards `base` is as before."""
    declare_missing_ops()
    import peft

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 reads a name that transformers 5 deprecates
        tuned = peft.get_peft_model(base, config(method, route), low_cpu_mem_usage=True)
    try:
        yield tuned
    finally:
        tuned.unload().requires_grad_(False)


def trainable(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(param.numel() for param in model.parameters() if param.requires_grad)


def count_macs(model: PeftModel | PreTrainedModel, load: Workload) -> Macs:
    """MACs of a forward and of a backward pass in training; backward is 0 where nothing is trainable."""
    images = model.config.model_type == "vit"
    size, dtype = ((load.batch, 3, 224, 224), torch.float32) if images else (tuple(load), torch.long)
    inputs = torch.empty(size, dtype=dtype, device="meta")
    with counter() as forward:
        outputs = model.train()(inputs)[0]
    with counter() as backward:
        if outputs.requires_grad:
            outputs.sum().backward()
    return Macs(forward.get_total_flops() // 2, backward.get_total_flops() // 2)


def count_layer_macs(
    spec: AdapterSpec, layer: LayerShape, tokens: int, route: Literal["branch", "merge"] = "branch"
) -> Macs:
    """MACs of the adapted projections of one layer: base products, factors and updates, inputs asking for gradients.

    XLA counts elementwise work too, so this is a little above the count by hand; FLOPs are halved.
    """
    shapes = param_shapes(spec, layer)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    inputs = {p: jax.ShapeDtypeStruct((tokens, shape.embed_dim), jnp.float32) for p, shape in layer.items()}
    outputs = {p: jax.ShapeDtypeStruct((tokens, shape.weight_shape[0]), jnp.float32) for p, shape in layer.items()}
    weights = {p: jax.ShapeDtypeStruct(shape.weight_shape, jnp.float32) for p, shape in layer.items()}

    def project(params: dict, inputs: dict, weights: dict) -> dict:
        generated = factors(spec, layer, params)
        return {p: hora_linear(inputs[p], weights[p], None, generated[p], spec.scaling, route=route) for p in layer}

    def train(params: dict, inputs: dict, weights: dict, gradient: dict) -> tuple:
        result, back = jax.vjp(lambda params, inputs: project(params, inputs, weights), params, inputs)
        return result, back(gradient)

    forward = _flops(project, params, inputs, weights)
    return Macs(forward // 2, (_flops(train, params, inputs, weights, outputs) - forward) // 2)


def _flops(function: Callable[..., Any], *arguments: dict) -> int:
    analysis: Any = jax.jit(function).lower(*arguments).cost_analysis()
    return int(analysis["flops"])
