"""Cases: what a check runs on, fully described by a spec, a layer, a seed and a regime."""

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hora_spec.activations import ACTIVATIONS
from hora_spec.errors import HoraError
from hora_spec.init import normal, raw_stream
from hora_spec.reference import Factors
from hora_spec.shapes import LayerShape, ProjectionShape, param_shapes
from hora_spec.spec import AdapterSpec

Array = NDArray[Any]

REGIMES = ("normal", "offset", "constant", "zeros", "tiny")
"""What head embeddings and the seed of A look like; everything else is standard normal.

``normal``; ``offset`` by 64, where normalisation cancels; ``constant`` columns, which it maps to zero; ``zeros``, which
sit on the kink of the activation; ``tiny``, 1/1024 of normal, where eps outweighs the variance.
"""


class Inputs(NamedTuple):
    """Arrays of one case. All but `params` map a projection to its array.

    Attributes
    ----------
    params
        Canonical parameters of the layer.
    factors
        Free factors to try the adapted projection with.
    x
        (batch, seq, embed).
    weight
        Frozen canonical weight (heads * head_dim, embed).
    bias
        (heads * head_dim,), or None for every second projection.
    cotangent
        (batch, seq, heads * head_dim): a gradient with respect to the output.
    delta_cotangent
        (heads * head_dim, embed): a gradient with respect to the delta.
    """

    params: dict[str, Array]
    factors: dict[str, Factors]
    x: dict[str, Array]
    weight: dict[str, Array]
    bias: dict[str, Array | None]
    cotangent: dict[str, Array]
    delta_cotangent: dict[str, Array]


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to compute; its ``repr`` is all that is needed to replay it.

    Parameters
    ----------
    spec, layer
        Method and shapes.
    seed, regime
        Determine every value, to the bit, on every platform.

    Examples
    --------
    >>> case = Case(AdapterSpec(rank=2), LAYERS["equal"], seed=3)
    >>> case.inputs("float32").params["a.q"].shape
    (2, 6)
    """

    spec: AdapterSpec
    layer: LayerShape
    seed: int = 0
    regime: str = "normal"

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise HoraError(f"a regime is one of {REGIMES}, got {self.regime!r}: it says what embeddings look like")

    def inputs(self, dtype: str = "float32") -> Inputs:
        """Fresh arrays of `dtype`; values are float32 numbers, rounded once more for a 16-bit dtype.

        Parameters, factors and gradients of the delta stay float32 when `dtype` has 16 bits, as they do in training.
        """
        wide = param_dtype(dtype)
        draw, cast = self.draw, numpy_dtype(dtype)
        params = {key: self._param(key, shape) for key, shape in param_shapes(self.spec, self.layer).items()}
        result = Inputs({key: value.astype(wide) for key, value in params.items()}, {}, {}, {}, {}, {}, {})
        for i, (p, shape) in enumerate(self.layer.items()):
            heads, head_dim, embed, rank = shape.num_heads, shape.head_dim, shape.embed_dim, self.spec.rank
            a = draw(f"factor_a.{p}", (rank, embed) if self.spec.shares_a else (heads, rank, embed))
            b = draw(f"factor_b.{p}", (heads, head_dim, rank))
            result.factors[p] = Factors(a.astype(wide), b.astype(wide))
            result.x[p] = draw(f"x.{p}", (2, 3, embed)).astype(cast)
            result.weight[p] = draw(f"weight.{p}", shape.weight_shape).astype(cast)
            result.bias[p] = None if i % 2 else draw(f"bias.{p}", (heads * head_dim,)).astype(cast)
            result.cotangent[p] = draw(f"cotangent.{p}", (2, 3, heads * head_dim)).astype(cast)
            result.delta_cotangent[p] = draw(f"delta_cotangent.{p}", shape.weight_shape).astype(wide)
        return result

    def draw(self, key: str, shape: tuple[int, ...]) -> Array:
        """Standard normal float32 numbers that belong to this case and `key`."""
        return normal(raw_stream(self.seed, "hora_spec.testing", key, prod(shape))).reshape(shape).astype(np.float32)

    def _param(self, key: str, shape: tuple[int, ...]) -> Array:
        value = self.draw(key, shape)
        if key not in ("head_embed", "a_seed") or self.regime == "normal":
            return value
        if self.regime == "offset":
            return value + np.float32(64)
        if self.regime == "constant":
            return np.broadcast_to(value[..., :1, :] if value.ndim == 3 else value[:1], shape).copy()
        return value * np.float32(0 if self.regime == "zeros" else 2.0**-10)


def param_dtype(dtype: str) -> str:
    """Dtype of the parameters beside activations of `dtype`: never below float32."""
    return "float64" if dtype == "float64" else "float32"


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype called `name`; ``"bfloat16"`` needs the package ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _layer(**shapes: tuple[int, int, int]) -> LayerShape:
    return LayerShape({p: ProjectionShape(*shape) for p, shape in shapes.items()})


LAYERS: dict[str, LayerShape] = {
    "one_head": _layer(q=(1, 3, 5), v=(1, 3, 5)),
    "equal": _layer(q=(4, 3, 6), v=(4, 3, 6)),
    "square": _layer(q=(2, 3, 6), v=(2, 3, 6)),
    "qkv": _layer(q=(3, 2, 5), k=(3, 2, 5), v=(3, 2, 5)),
    "gqa_2_1": _layer(q=(4, 2, 8), v=(2, 2, 8)),
    "gqa_3_1": _layer(q=(6, 2, 5), v=(2, 2, 5)),
    "multi_query": _layer(q=(4, 2, 5), k=(1, 2, 5), v=(1, 2, 5)),
    "uneven": _layer(q=(4, 3, 6), k=(2, 2, 5), v=(2, 4, 7)),
}
"""The fixed table of shapes: a new shape costs JAX a compilation."""

SIZES: tuple[dict[str, Any], ...] = (
    {"rank": 3, "hidden_dim": 5, "head_embed_dim": 4},
    {"rank": 5, "hidden_dim": 3, "head_embed_dim": 6},
)
"""The fixed table of method sizes; in the second, hidden is smaller than rank."""

GENERATING = (("full", "direct"), ("full", "hypernetwork"), ("b", "direct"), ("a", "hypernetwork"))
FREE = (("a", "direct"), ("none", "direct"))
FIXED = (("full", "fixed"), ("a", "fixed"), ("b", "fixed"), ("none", "fixed"))
"""Valid ``(sharing, a_source)`` in which something is generated, in which nothing is, and in which A is fixed."""


def corpus() -> tuple[Case, ...]:
    """Every case that a backend is judged on: those of all versions of the goldens."""
    return first_corpus() + second_corpus()


def second_corpus() -> tuple[Case, ...]:
    """A fixed A under every sharing, one A for all projections, and gates beside 1, with and without their gain."""
    equal_widths = ("equal", "gqa_3_1", "multi_query", "qkv", "square", "gqa_2_1")
    methods: list[dict[str, Any]] = [
        *({"sharing": sharing, "a_source": a_source} for sharing, a_source in FIXED),
        *({"sharing": "full", "residual": True, "gate": gate, "gain": gain} for gate, gain in _GATES),
        {"sharing": "a", "tie_a": True},
        {"sharing": "full", "tie_a": True, "activation": "tanh"},
        {"sharing": "a", "tie_a": True, "a_source": "fixed"},
        {"sharing": "b", "residual": True, "gate": 1.0, "activation": "gelu", "a_source": "fixed"},
    ]
    return tuple(
        Case(
            AdapterSpec(**SIZES[n % 2], **method, alpha=(6.0, None)[n // 3 % 2]),
            LAYERS[equal_widths[n % len(equal_widths)]],
            seed=100 + n,
            regime=REGIMES[n % 2],
        )
        for n, method in enumerate(methods)
    )


_GATES: tuple[tuple[float, float | str], ...] = ((1.0, "transfer"), (0.25, "transfer"), (3.0, 1.0))


def first_corpus() -> tuple[Case, ...]:
    """Every valid sharing, trained A, activation and gain once, over all layers, sizes and regimes in turn.

    Residual, scaling and normalisation alternate where they are allowed.
    """
    methods: list[dict[str, Any]] = [
        {"sharing": sharing, "a_source": a_source, "activation": activation, "gain": gain}
        for gain in ("transfer", 1.0)
        for activation in ACTIVATIONS
        for sharing, a_source in (GENERATING + FREE if gain == "transfer" else GENERATING)
    ]
    layers = list(LAYERS.values())
    cases = []
    for n, method in enumerate(methods):
        spec = AdapterSpec(**SIZES[n // 8 % 2], **method, alpha=(6.0, None)[n // 3 % 2])
        if spec.generates_b:
            spec = spec.replace(residual=(n + n // 4) % 2 == 0, normalize=n % 9 != 4)
        cases.append(Case(spec, layers[n % len(layers)], seed=n, regime=REGIMES[n % 7 if n % 7 < 5 else 0]))
    return tuple(cases)
