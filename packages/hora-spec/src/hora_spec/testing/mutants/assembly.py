"""Mutants of what surrounds the generation: initialisation, factors, delta."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hora_spec import reference
from hora_spec.reference import Factors
from hora_spec.shapes import LayerShape, ProjectionShape
from hora_spec.spec import AdapterSpec
from hora_spec.testing.backend import Arrays, Backend
from hora_spec.testing.checks import check_delta, check_factors, check_init
from hora_spec.testing.mutants.mutant import mutant

Array = NDArray[Any]
Params = Mapping[str, Array]


@mutant("I1", check_init)
def seedless(backend: Backend) -> Backend:
    """Initialisation ignores the seed."""
    return backend._replace(init_params=lambda spec, layer, seed, name: backend.init_params(spec, layer, 0, name))


@mutant("I1", check_init)
def nameless(backend: Backend) -> Backend:
    """Initialisation ignores the layer's name."""
    return backend._replace(init_params=lambda spec, layer, seed, name: backend.init_params(spec, layer, seed, "layer"))


@mutant("I1", check_init)
def other_order(backend: Backend) -> Backend:
    """Initialisation draws parameters in another order."""

    def init_params(spec: AdapterSpec, layer: LayerShape, seed: int, name: str) -> Arrays:
        params = backend.init_params(spec, layer, seed, name)
        backwards = np.concatenate([value.ravel() for value in reversed(params.values())])
        ends = np.cumsum([value.size for value in params.values()])[:-1]
        parts = zip(params, np.split(backwards, ends), strict=True)
        return {key: part.reshape(params[key].shape) for key, part in parts}

    return backend._replace(init_params=init_params)


@mutant("I5", check_init)
def gainless_bound(backend: Backend) -> Backend:
    """Initialisation of a generated A forgets the gain."""

    def init_params(spec: AdapterSpec, layer: LayerShape, seed: int, name: str) -> Arrays:
        params = backend.init_params(spec, layer, seed, name)
        return {key: value * np.float32(spec.gain_a if key[:5] == "a_out" else 1) for key, value in params.items()}

    return backend._replace(init_params=init_params)


@mutant("I4", check_init)
def warm_start(backend: Backend) -> Backend:
    """The last layer of B starts away from zero."""

    def init_params(spec: AdapterSpec, layer: LayerShape, seed: int, name: str) -> Arrays:
        params = backend.init_params(spec, layer, seed, name)
        return {key: value + np.float32(1e-3 * key.startswith("b")) for key, value in params.items()}

    return backend._replace(init_params=init_params)


@mutant("G4", check_factors)
def seedless_a(backend: Backend) -> Backend:
    """The seed of A is ignored."""

    def factors(spec: AdapterSpec, layer: LayerShape, params: Params) -> dict[str, Factors]:
        ones = {"a_seed": np.ones_like(params["a_seed"])} if spec.generates_a else {}
        return backend.factors(spec, layer, {**params, **ones})

    return backend._replace(factors=factors)


@mutant("G6", check_factors)
def no_residual(backend: Backend) -> Backend:
    """The residual is dropped."""
    return _on_residual(backend, lambda spec, value: 0 * value)


@mutant("G6", check_factors)
def scaled_residual(backend: Backend) -> Backend:
    """The gain multiplies the residual too."""
    return _on_residual(backend, lambda spec, value: value * np.asarray(spec.gain_b, value.dtype))


@mutant("G8", check_factors)
def ungated(backend: Backend) -> Backend:
    """The gate is ignored, its gain is not."""
    return _on_gate(backend, lambda spec, gate: np.ones_like(gate))


@mutant("G8", check_factors)
def inverted_gate(backend: Backend) -> Backend:
    """The gate weighs the other part: where it should be small it is large."""
    return _on_gate(backend, lambda spec, gate: 1 - gate)


@mutant("G8", check_factors)
def gate_outside_the_gain(backend: Backend) -> Backend:
    """The gated residual misses its gain."""
    return _on_gate(backend, lambda spec, gate: gate / np.asarray(spec.gain_residual, gate.dtype))


@mutant("G8", check_factors)
def one_gate(backend: Backend) -> Backend:
    """All projections have the gate of the first."""

    def factors(spec: AdapterSpec, layer: LayerShape, params: Params) -> dict[str, Factors]:
        gates = [key for key in params if key.startswith("gate.")]
        return backend.factors(spec, layer, {**params, **{key: params[first] for first in gates[:1] for key in gates}})

    return backend._replace(factors=factors)


@mutant("I4", check_init)
def shut_gate(backend: Backend) -> Backend:
    """Gates start at one whatever the spec says."""

    def init_params(spec: AdapterSpec, layer: LayerShape, seed: int, name: str) -> Arrays:
        params = backend.init_params(spec, layer, seed, name)
        return {key: np.ones_like(value) if key[:4] == "gate" else value for key, value in params.items()}

    return backend._replace(init_params=init_params)


@mutant("G4", check_factors)
def outer_activation(backend: Backend) -> Backend:
    """An activation behind B."""
    return _on_factors(
        backend, lambda spec, a, b: (a, reference.activation(spec.activation, b) if spec.generates_b else b)
    )


@mutant("G4", check_factors)
def rank_for_head_dim(backend: Backend) -> Backend:
    """Rank and head_dim of B swapped, seen where they are equal too."""
    return _on_factors(backend, lambda spec, a, b: (a, b.swapaxes(1, 2).reshape(b.shape)))


@mutant("G4", check_factors)
def transposed_a(backend: Backend) -> Backend:
    """A transposed, and reshaped to fit."""
    return _on_factors(backend, lambda spec, a, b: (a.swapaxes(-1, -2).reshape(a.shape), b))


@mutant("G4", check_factors)
def swapped_projections(backend: Backend) -> Backend:
    """The last layers of two projections of equal shape swapped."""

    def factors(spec: AdapterSpec, layer: LayerShape, params: Params) -> dict[str, Factors]:
        made = backend.factors(spec, layer, params)
        twin = {shape: p for p, shape in layer.items()}
        first = {shape: p for p, shape in reversed(list(layer.items()))}
        return {p: made[twin[shape] if first[shape] == p else first[shape]] for p, shape in layer.items()}

    return backend._replace(factors=factors)


@mutant("D1", check_delta)
def scaled_twice(backend: Backend) -> Backend:
    """Scaling twice."""
    return _on_delta(backend, lambda spec, shape, delta: spec.scaling * delta)


@mutant("D1", check_delta)
def unscaled(backend: Backend) -> Backend:
    """No scaling."""
    return _on_delta(backend, lambda spec, shape, delta: delta / spec.scaling)


@mutant("D2", check_delta)
def interleaved_heads(backend: Backend) -> Backend:
    """Rows of the delta in the order head_dim, heads."""
    return _on_delta(
        backend,
        lambda spec, shape, delta: (
            delta.reshape(shape.num_heads, shape.head_dim, -1).swapaxes(0, 1).reshape(delta.shape)
        ),
    )


@mutant("D2", check_delta)
def transposed_delta(backend: Backend) -> Backend:
    """The delta transposed, seen where it is square too."""
    return _on_delta(backend, lambda spec, shape, delta: delta.T.reshape(delta.shape))


def _on_gate(backend: Backend, change: Callable[[AdapterSpec, Array], Array]) -> Backend:
    def factors(spec: AdapterSpec, layer: LayerShape, params: Params) -> dict[str, Factors]:
        changed = {key: change(spec, value) if key[:5] == "gate." else value for key, value in params.items()}
        return backend.factors(spec, layer, changed)

    return backend._replace(factors=factors)


def _on_residual(backend: Backend, change: Callable[[AdapterSpec, Array], Array]) -> Backend:
    def factors(spec: AdapterSpec, layer: LayerShape, params: Params) -> dict[str, Factors]:
        free = {key for key in params if key.startswith("b.")} if spec.residual else set()
        changed = {key: change(spec, value) if key in free else value for key, value in params.items()}
        return backend.factors(spec, layer, changed)

    return backend._replace(factors=factors)


def _on_factors(backend: Backend, change: Callable[[AdapterSpec, Array, Array], tuple[Array, Array]]) -> Backend:
    def factors(spec: AdapterSpec, layer: LayerShape, params: Params) -> dict[str, Factors]:
        return {p: Factors(*change(spec, a, b)) for p, (a, b) in backend.factors(spec, layer, params).items()}

    return backend._replace(factors=factors)


def _on_delta(backend: Backend, change: Callable[[AdapterSpec, ProjectionShape, Array], Array]) -> Backend:
    def delta(spec: AdapterSpec, layer: LayerShape, params: Params) -> Arrays:
        return {p: change(spec, layer[p], value) for p, value in backend.delta(spec, layer, params).items()}

    return backend._replace(delta=delta)
