"""How much of what an adapter learned is shared by heads (spec G8)."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from hora_spec import reference
from hora_spec.shapes import LayerShape
from hora_spec.spec import AdapterSpec


def generated_share(spec: AdapterSpec, layer: LayerShape, params: Mapping[str, ArrayLike]) -> dict[str, float]:
    """Part of B's squared norm that the hypernetwork generates, by projection; the free part has the rest.

    Parameters
    ----------
    spec, layer, params
        As for `hora_spec.reference.factors`.

    Returns
    -------
    dict
        Projection to a number in [0, 1]: 1 where nothing is free, 0 where nothing is generated, NaN where B is zero.

    Examples
    --------
    >>> from hora_spec import init_params
    >>> layer = LayerShape.attention(embed_dim=8, num_heads=2)
    >>> spec = AdapterSpec(2)
    >>> generated_share(spec, layer, init_params(spec, layer, 0, "layer"))
    {'q': 1.0, 'v': 1.0}
    """
    if not spec.residual:
        return dict.fromkeys(layer, 1.0 if spec.generates_b else 0.0)
    arrays = {key: np.asarray(value) for key, value in params.items()}
    whole = reference.factors(spec, layer, arrays)
    silent = {key: np.zeros_like(value) if key.startswith("b.") else value for key, value in arrays.items()}
    shares = {}
    for p, factors in reference.factors(spec, layer, silent).items():
        generated, free = np.square(factors.b).sum(), np.square(whole[p].b - factors.b).sum()
        shares[p] = float(generated / (generated + free)) if generated + free > 0 else float("nan")
    return shares
