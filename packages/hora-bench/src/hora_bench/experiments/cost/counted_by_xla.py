"""The same numbers by XLA: its cost analysis of the adapted projections of one layer, on abstract shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from hora_jax.functional import factors, hora_linear
from hora_spec import AdapterSpec, LayerShape, param_shapes

from .formulas import Macs


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
