"""Mistakes in the middle of the generation, made around a backend that can only be called as a whole.

The hidden activations of a layer are computed here, wrongly where a mutant says so, and given to the honest backend in
a form that it passes through unchanged: identity activation, identity first layer, no normalisation, gain 1.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hora_spec import reference
from hora_spec.shapes import LayerShape
from hora_spec.spec import AdapterSpec
from hora_spec.testing.backend import Arrays, Backend

Array = NDArray[Any]
Generated = tuple[AdapterSpec, LayerShape, Arrays]
Embed = Callable[[Array, bool], Array]
Activation = Callable[[str, Array], Array]
Gains = Callable[[float, float], tuple[float, float]]


def embed(groups: Array, normalize: bool) -> Array:
    """The honest input of the hypernetwork: mean of the raw embeddings of a group, then LN (spec G1, G2).

    ``heads group head_embed rank -> heads head_embed rank``.
    """
    mean = groups.mean(1)
    return np.stack([reference.normalize(head) for head in mean]) if normalize else mean


def gains(gain_a: float, gain_b: float) -> tuple[float, float]:
    """The honest gains of A and B (spec G5)."""
    return gain_a, gain_b


def rewired(
    backend: Backend,
    *,
    embed: Embed = embed,
    activation: Activation = reference.activation,
    gains: Gains = gains,
) -> Backend:
    """`backend` with other steps inside its factors and delta; without arguments, an honest backend still."""

    def one(spec: AdapterSpec, layer: LayerShape, params: Mapping[str, Array], p: str) -> Generated:
        if not (spec.generates_a or spec.generates_b):
            return spec, layer, dict(params)
        alone = LayerShape({p: layer[p]})
        given = {key: value for key, value in params.items() if key.partition(".")[2] in ("", p)}
        dtype = next(iter(params.values())).dtype
        wide = {key: value.astype(np.float64) for key, value in given.items()}
        gain_a, gain_b = gains(spec.gain_a, spec.gain_b)
        if spec.generates_a:
            hidden = gain_a * activation(spec.activation, wide["a_in"] * wide["a_seed"])
            given |= {"a_seed": np.ones(spec.rank, dtype), "a_in": hidden.astype(dtype)}
        if spec.gate is not None:
            given[f"gate.{p}"] = (spec.gain_residual * wide[f"gate.{p}"]).astype(dtype)
        if spec.generates_b:
            raw = wide["head_embed"]
            groups = raw.reshape(layer[p].num_heads, -1, *raw.shape[1:])
            hidden = gain_b * activation(spec.activation, wide["b_in"] @ embed(groups, spec.normalize))
            given |= {"head_embed": hidden.astype(dtype), "b_in": np.eye(spec.hidden_dim, dtype=dtype)}
        through = spec.replace(activation="identity", gain=1.0, normalize=False, head_embed_dim=spec.hidden_dim)
        return through, alone, given

    return backend._replace(
        factors=lambda spec, layer, params: {p: backend.factors(*one(spec, layer, params, p))[p] for p in layer},
        delta=lambda spec, layer, params: {p: backend.delta(*one(spec, layer, params, p))[p] for p in layer},
    )
