"""Mutants of the gradients of parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hora_spec import reference
from hora_spec.shapes import LayerShape, is_trained
from hora_spec.spec import AdapterSpec
from hora_spec.testing.backend import Arrays, Backend
from hora_spec.testing.checks import check_grads
from hora_spec.testing.mutants.mutant import mutant

Array = NDArray[Any]
Params = Mapping[str, Array]


@mutant("G7", check_grads)
def through_normalization(backend: Backend) -> Backend:
    """The gradient of head embeddings stops before the normalisation."""

    def change(spec: AdapterSpec, layer: LayerShape, params: Params, cotangents: Params, honest: Arrays) -> Arrays:
        if not (spec.generates_b and spec.normalize):
            return {}
        raw = params["head_embed"]
        inner = np.stack([reference.normalize(head) for head in raw.astype(np.float64)]).astype(raw.dtype)
        given = {**params, "head_embed": inner}
        return {"head_embed": backend.grads(spec.replace(normalize=False), layer, given, cotangents)["head_embed"]}

    return _on_grads(backend, change)


@mutant("G7", check_grads)
def without_centring(backend: Backend) -> Backend:
    """The gradient of head embeddings is not centred along head_embed."""

    def change(spec: AdapterSpec, layer: LayerShape, params: Params, cotangents: Params, honest: Arrays) -> Arrays:
        if not (spec.generates_b and spec.normalize):
            return {}
        grad = honest["head_embed"]
        return {"head_embed": grad + np.abs(grad).mean(1, keepdims=True)}

    return _on_grads(backend, change)


@mutant("G7", check_grads)
def undivided_group(backend: Backend) -> Backend:
    """The gradient of a group is not divided by its size."""

    def change(spec: AdapterSpec, layer: LayerShape, params: Params, cotangents: Params, honest: Arrays) -> Arrays:
        scaled = {p: value * np.asarray(layer.group_size(p), value.dtype) for p, value in cotangents.items()}
        grads = backend.grads(spec, layer, params, scaled)
        return {"head_embed": grads["head_embed"]} if spec.generates_b else {}

    return _on_grads(backend, change)


@mutant("G7", check_grads)
def first_projection(backend: Backend) -> Backend:
    """The shared first layer of B learns from one projection alone."""

    def change(spec: AdapterSpec, layer: LayerShape, params: Params, cotangents: Params, honest: Arrays) -> Arrays:
        alone = {p: value * np.asarray(i == 0, value.dtype) for i, (p, value) in enumerate(cotangents.items())}
        return {"b_in": backend.grads(spec, layer, params, alone)["b_in"]} if spec.generates_b else {}

    return _on_grads(backend, change)


@mutant("G7", check_grads)
def frozen_seed(backend: Backend) -> Backend:
    """The seed of A gets no gradient."""

    def change(spec: AdapterSpec, layer: LayerShape, params: Params, cotangents: Params, honest: Arrays) -> Arrays:
        return {"a_seed": np.zeros_like(honest["a_seed"])} if spec.generates_a else {}

    return _on_grads(backend, change)


@mutant("G7", check_grads)
def trained_fixed_a(backend: Backend) -> Backend:
    """A fixed A gets the gradient of a free one."""

    def change(spec: AdapterSpec, layer: LayerShape, params: Params, cotangents: Params, honest: Arrays) -> Arrays:
        if spec.trains_a:
            return {}
        grads = backend.grads(spec.replace(a_source="direct"), layer, params, cotangents)
        return {key: value for key, value in grads.items() if not is_trained(spec, key)}

    return _on_grads(backend, change)


@mutant("G7", check_grads)
def tied_to_one(backend: Backend) -> Backend:
    """One A for all projections learns from the first of them alone."""

    def change(spec: AdapterSpec, layer: LayerShape, params: Params, cotangents: Params, honest: Arrays) -> Arrays:
        alone = {p: value * np.asarray(i == 0, value.dtype) for i, (p, value) in enumerate(cotangents.items())}
        return {"a": backend.grads(spec, layer, params, alone)["a"]} if spec.tie_a else {}

    return _on_grads(backend, change)


@mutant("G8", check_grads)
def dead_gate(backend: Backend) -> Backend:
    """Gates get no gradient."""
    return _on_grads(
        backend,
        lambda spec, layer, params, cotangents, honest: {
            key: np.zeros_like(value) for key, value in honest.items() if key.startswith("gate.")
        },
    )


@mutant("G7", check_grads)
def first_head(backend: Backend) -> Backend:
    """A learns from the first head alone."""

    def change(spec: AdapterSpec, layer: LayerShape, params: Params, cotangents: Params, honest: Arrays) -> Arrays:
        alone = {p: value * (np.arange(len(value)) < layer[p].head_dim)[:, None] for p, value in cotangents.items()}
        grads = backend.grads(spec, layer, params, alone)
        return {key: value for key, value in grads.items() if key.startswith("a")}

    return _on_grads(backend, change)


@mutant("G7", check_grads)
def unscaled_gradients(backend: Backend) -> Backend:
    """Gradients forget the scaling."""
    return _on_grads(
        backend, lambda spec, layer, params, cotangents, honest: {k: v / spec.scaling for k, v in honest.items()}
    )


@mutant("G3", check_grads)
def kink(backend: Backend) -> Backend:
    """At its kink the activation has the slope of the positive side."""

    def change(spec: AdapterSpec, layer: LayerShape, params: Params, cotangents: Params, honest: Arrays) -> Arrays:
        kinked = spec.activation in ("relu", "leaky_relu")
        if not (kinked and spec.generates_b) or params["head_embed"].any():
            return {}
        # every hidden pre-activation of B is zero, where the identity has the slope of the positive side
        smooth = spec.replace(activation="identity", gain=spec.gain_b)
        return {"head_embed": backend.grads(smooth, layer, params, cotangents)["head_embed"]}

    return _on_grads(backend, change)


def _on_grads(backend: Backend, change: Callable[[AdapterSpec, LayerShape, Params, Params, Arrays], Arrays]) -> Backend:
    """`backend` with some gradients replaced by what `change` makes of its arguments and the honest gradients."""

    def grads(spec: AdapterSpec, layer: LayerShape, params: Params, cotangents: Params) -> Arrays:
        honest = backend.grads(spec, layer, params, cotangents)
        return {**honest, **change(spec, layer, params, cotangents, honest)}

    return backend._replace(grads=grads)
