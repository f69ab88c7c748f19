"""Shapes: projections, layers, and the canonical parameters of a layer (spec S3 to S7)."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from hora_spec.errors import HoraError
from hora_spec.spec import AdapterSpec, positive_int

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class ProjectionShape:
    """One linear map whose ``num_heads * head_dim`` output rows are split into heads (spec S3).

    Parameters
    ----------
    num_heads
        Heads H_p.
    head_dim
        Output rows d_p of one head.
    embed_dim
        Input width D_p.
    """

    num_heads: int
    head_dim: int
    embed_dim: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            object.__setattr__(self, name, positive_int(name, getattr(self, name)))

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape ``(heads * head_dim, embed)`` of the canonical weight and of the delta."""
        return (self.num_heads * self.head_dim, self.embed_dim)


class LayerShape(Mapping[str, ProjectionShape]):
    """The projections of one attention block that share a hypernetwork, in order of their names (spec S4).

    Examples
    --------
    >>> layer = LayerShape.attention(embed_dim=576, num_heads=9, num_kv_heads=3)
    >>> layer.num_heads, layer.group_size("v"), layer["v"].weight_shape
    (9, 3, (192, 576))
    """

    __slots__ = ("_projections",)

    def __init__(self, projections: Mapping[str, ProjectionShape]) -> None:
        if not projections:
            raise HoraError("a layer needs at least one projection, got none: name the targets (spec S4)")
        for name, shape in projections.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise HoraError(
                    f"a projection name is letters, digits and underscores, got {name!r}: it becomes part of "
                    "parameter names (spec S4)"
                )
            if not isinstance(shape, ProjectionShape):
                raise HoraError(f"projection {name!r} must be a ProjectionShape, got {shape!r} (spec S4)")
        self._projections = dict(sorted(projections.items()))
        for name, shape in self.items():
            if self.num_heads % shape.num_heads:
                raise HoraError(
                    f"every head count divides the largest, {self.num_heads}, got {shape.num_heads} for {name!r}: "
                    "such projections cannot share a hypernetwork; put them into layers of their own (spec S5)"
                )

    @classmethod
    def attention(
        cls,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        targets: tuple[str, ...] = ("q", "v"),
    ) -> Self:
        """The layer of a standard attention block.

        Parameters
        ----------
        embed_dim
            Input width of every projection.
        num_heads
            Query heads.
        num_kv_heads
            Key and value heads; ``num_heads`` when None.
        head_dim
            Rows of one head; ``embed_dim / num_heads`` when None.
        targets
            Projections among ``q``, ``k`` and ``v``.

        Raises
        ------
        HoraError
            If heads do not divide, or a target is none of q, k, v (spec S3, S5).
        """
        embed_dim, num_heads = positive_int("embed_dim", embed_dim), positive_int("num_heads", num_heads)
        if head_dim is None:
            if embed_dim % num_heads:
                raise HoraError(
                    f"num_heads must divide embed_dim, got {num_heads} and {embed_dim}: pass head_dim (spec S3)"
                )
            head_dim = embed_dim // num_heads
        heads = {"q": num_heads, "k": num_kv_heads or num_heads, "v": num_kv_heads or num_heads}
        if unknown := [target for target in targets if target not in heads]:
            raise HoraError(
                f"targets are among 'q', 'k' and 'v', got {unknown}: only maps whose output rows are split into "
                "heads can be adapted (spec S3)"
            )
        return cls({target: ProjectionShape(heads[target], head_dim, embed_dim) for target in targets})

    @property
    def num_heads(self) -> int:
        """H, the largest head count: the number of head embeddings."""
        return max(shape.num_heads for shape in self.values())

    def group_size(self, projection: str) -> int:
        """How many consecutive head embeddings one head of `projection` averages: ``H / H_p`` (spec S5, G2)."""
        return self.num_heads // self[projection].num_heads

    def __getitem__(self, name: str) -> ProjectionShape:
        return self._projections[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._projections)

    def __len__(self) -> int:
        return len(self._projections)

    def __hash__(self) -> int:
        return hash(tuple(self.items()))

    def __repr__(self) -> str:
        return f"LayerShape({self._projections!r})"


def param_shapes(spec: AdapterSpec, layer: LayerShape) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of one layer's parameters, in canonical order (spec S6).

    ``a_seed (rank,)``, ``a_in (hidden, rank)``, ``a_out.p (embed, hidden)`` for a generated A; ``a.p (rank, embed)``
    for a direct or fixed one, ``(heads, rank, embed)`` when free per head, ``a (rank, embed)`` when tied;
    ``head_embed (heads, head_embed, rank)``, ``b_in (hidden, head_embed)``, ``b_out.p (head_dim, hidden)`` for a
    generated B; ``b.p (heads, head_dim, rank)`` for a free B or the residual; ``gate.p (1,)`` for its gate.

    Raises
    ------
    HoraError
        If A is tied and input widths differ (spec S8).
    """
    rank, hidden, embed = spec.rank, spec.hidden_dim, spec.head_embed_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if spec.generates_a:
        shapes |= {"a_seed": (rank,), "a_in": (hidden, rank)}
        shapes |= {f"a_out.{p}": (shape.embed_dim, hidden) for p, shape in layer.items()}
    elif spec.tie_a:
        shapes["a"] = (rank, _common_embed_dim(layer))
    elif spec.shares_a:
        shapes |= {f"a.{p}": (rank, shape.embed_dim) for p, shape in layer.items()}
    else:
        shapes |= {f"a.{p}": (shape.num_heads, rank, shape.embed_dim) for p, shape in layer.items()}
    if spec.generates_b:
        shapes |= {"head_embed": (layer.num_heads, embed, rank), "b_in": (hidden, embed)}
        shapes |= {f"b_out.{p}": (shape.head_dim, hidden) for p, shape in layer.items()}
    if spec.residual or not spec.generates_b:
        shapes |= {f"b.{p}": (shape.num_heads, shape.head_dim, rank) for p, shape in layer.items()}
    if spec.gate is not None:
        shapes |= {f"gate.{p}": (1,) for p in layer}
    return shapes


def is_trained(spec: AdapterSpec, name: str) -> bool:
    """Whether the parameter called `name` is trained, which all are but a fixed A (spec S6)."""
    return spec.trains_a or name.partition(".")[0] != "a"


def name_of_a(spec: AdapterSpec, projection: str) -> str:
    """Name of the parameter that is the A of `projection`, where none is generated (spec S6)."""
    return "a" if spec.tie_a else f"a.{projection}"


def count_params(spec: AdapterSpec, layer: LayerShape, *, trained: bool = True) -> int:
    """Number of trained values of one layer, or with ``trained=False`` of all stored ones (spec S6).

    Examples
    --------
    >>> llama_7b = LayerShape.attention(embed_dim=4096, num_heads=32)
    >>> 32 * count_params(AdapterSpec.paper(32), llama_7b)
    6096384
    """
    shapes = param_shapes(spec, layer)
    return sum(math.prod(shape) for name, shape in shapes.items() if not trained or is_trained(spec, name))


def _common_embed_dim(layer: LayerShape) -> int:
    widths = {p: shape.embed_dim for p, shape in layer.items()}
    if len(set(widths.values())) > 1:
        raise HoraError(
            f"one A for all projections of a layer needs equal input widths, got {widths}: use tie_a=False (spec S8)"
        )
    return next(iter(widths.values()))


def check_params(spec: AdapterSpec, layer: LayerShape, params: Mapping[str, ArrayLike], *, name: str = "") -> None:
    """Raise unless `params` holds exactly the canonical parameters, floating and finite (spec S7).

    Parameters
    ----------
    spec, layer
        What the parameters must fit.
    params
        Flat mapping from canonical name to array.
    name
        Name of the layer, for the message.
    """
    where = f"layer {name!r}: " if name else ""
    expected = param_shapes(spec, layer)
    missing, extra = sorted(expected.keys() - params.keys()), sorted(params.keys() - expected.keys())
    if missing or extra:
        raise HoraError(
            f"{where}parameters must be exactly {list(expected)}, missing {missing}, extra {extra}: the adapter "
            "was made with another spec or layer (spec S7)"
        )
    for key, shape in expected.items():
        array = np.asarray(params[key])
        if array.shape != shape:
            hint = ": transpose first" if array.shape == shape[::-1] else ""
            raise HoraError(f"{where}{key} must have shape {shape}, got {array.shape}{hint} (spec S6)")
        if not np.issubdtype(array.dtype, np.floating):
            raise HoraError(f"{where}{key} must be floating, got {array.dtype}: cast to float32 (spec S7)")
        if not np.isfinite(array).all():
            raise HoraError(f"{where}{key} must be finite, got NaN or infinity: training diverged (spec S7)")
