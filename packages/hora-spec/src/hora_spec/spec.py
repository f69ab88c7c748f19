"""``AdapterSpec``: the hyper-parameters of the method, and what follows from them (spec S1, S2, G4, G5)."""

import dataclasses
import math
import operator
import sys
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, Self, get_args

from hora_spec.activations import ACTIVATIONS, mean_abs_normal, mean_abs_uniform
from hora_spec.errors import HoraError

LAYER_NORM_EPS = 1e-5
"""Added to the variance inside the root when a head embedding is normalised (spec G1)."""

Sharing = Literal["full", "a", "b", "none"]
ASource = Literal["direct", "hypernetwork", "fixed"]


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """Hyper-parameters of HoRA; the defaults are the project's recommendation.

    Parameters
    ----------
    rank
        Rank r of the factors.
    hidden_dim
        Width m of the hypernetwork's hidden layer. A generated factor has rank at most ``hidden_dim``.
    head_embed_dim
        Length e of a column of a head embedding.
    alpha
        ``scaling = alpha / rank``; ``None`` means ``alpha = rank``, so scaling 1.
    sharing
        What heads share: ``"full"`` a common A and generated B, ``"a"`` a common A and free B per head,
        ``"b"`` free A per head and generated B, ``"none"`` both free per head.
    a_source
        Where A comes from: a free matrix that is trained (``"direct"``), a ``"hypernetwork"``, or a matrix that stays
        what it is at the start (``"fixed"``).
    activation
        Hidden activation, one of `hora_spec.ACTIVATIONS`.
    gain
        Constant factor on every generated factor: ``"transfer"`` makes LoRA's learning rates fit (spec G5), a
        positive number is taken literally; 1.0 is the paper's form.
    residual
        Add a free, zero-initialised part to the generated B.
    gate
        Weigh the residual by a trained number per projection that starts at this one; ``None`` for a plain sum.
    tie_a
        Use one A for all projections of a layer, whose input widths must agree.
    normalize
        Normalise head embeddings along the head_embed axis; ``False`` is offered for the ablation alone.

    Raises
    ------
    HoraError
        If a value is outside its domain or two of them contradict each other (spec S1, S2).

    Notes
    -----
    Paper section 4; ``AdapterSpec.paper`` is the paper's reading, `hora_spec.PRESETS` names others. Rules S1, S2, G4,
    G5, G8.

    Examples
    --------
    >>> AdapterSpec(rank=4, alpha=8).scaling
    2.0
    >>> AdapterSpec.paper(32).hidden_dim
    20
    """

    rank: int = 8
    _: KW_ONLY
    hidden_dim: int = 40
    head_embed_dim: int = 40
    alpha: float | None = None
    sharing: Sharing = "full"
    a_source: ASource = "direct"
    activation: str = "leaky_relu"
    gain: float | Literal["transfer"] = "transfer"
    residual: bool = False
    normalize: bool = True
    gate: float | None = None
    tie_a: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "hidden_dim", "head_embed_dim"):
            object.__setattr__(self, name, positive_int(name, getattr(self, name)))
        if self.alpha is not None:
            object.__setattr__(self, "alpha", _positive_float("alpha", self.alpha, "or None for scaling 1"))
        if self.gain != "transfer":
            object.__setattr__(self, "gain", _positive_float("gain", self.gain, 'or "transfer"'))
        if self.gate is not None:
            object.__setattr__(self, "gate", _positive_float("gate", self.gate, "or None for a plain sum"))
        _one_of("sharing", self.sharing, get_args(Sharing))
        _one_of("a_source", self.a_source, get_args(ASource))
        _one_of("activation", self.activation, ACTIVATIONS)
        for name in ("residual", "normalize", "tie_a"):
            if not isinstance(getattr(self, name), bool):
                raise HoraError(f"{name} must be True or False, got {getattr(self, name)!r} (spec S1)")
        self._check_consistency()

    def _check_consistency(self) -> None:
        if self.a_source == "hypernetwork" and not self.shares_a:
            raise HoraError(
                f'a_source="hypernetwork" needs heads that share A, got sharing={self.sharing!r}, where A is free '
                'per head: use sharing="full" or "a", or a_source="direct" (spec S2)'
            )
        if self.tie_a and (not self.shares_a or self.generates_a):
            raise HoraError(
                f"tie_a=True needs heads that share a free or fixed A, got sharing={self.sharing!r} and "
                f'a_source={self.a_source!r}: use sharing="full" or "a" with a_source="direct" or "fixed" (spec S2)'
            )
        if self.gate is not None and not self.residual:
            raise HoraError(
                f"a gate weighs the residual, got gate={self.gate} with residual=False: use residual=True (spec S2)"
            )
        if self.residual and not self.generates_b:
            raise HoraError(
                f"residual=True needs a generated B, got sharing={self.sharing!r}, where B is free already: "
                'use residual=False, or sharing="full" or "b" (spec S2)'
            )
        if self.gain != "transfer" and not (self.generates_a or self.generates_b):
            raise HoraError(
                f"gain scales generated factors, got gain={self.gain!r} with sharing={self.sharing!r} and "
                f"a_source={self.a_source!r}, where nothing is generated: leave gain out (spec S2)"
            )
        if self.generates_b and self.normalize and self.head_embed_dim < 2:
            raise HoraError(
                f"head_embed_dim must be at least 2 when embeddings are normalised, got {self.head_embed_dim}: one "
                "number minus its mean is zero, so B could never train; raise head_embed_dim (spec S2)"
            )

    @classmethod
    def paper(cls, rank: int) -> Self:
        """The paper's reading: A from the hypernetwork, hidden = head_embed = 20, leaky ReLU, gain 1 (spec S1)."""
        return cls(rank, hidden_dim=20, head_embed_dim=20, a_source="hypernetwork", gain=1.0)

    @property
    def scaling(self) -> float:
        """``alpha / rank``, 1 when alpha is None (spec D1)."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def shares_a(self) -> bool:
        """Whether all heads of a projection use one A."""
        return self.sharing in ("full", "a")

    @property
    def generates_a(self) -> bool:
        """Whether A comes from the hypernetwork."""
        return self.shares_a and self.a_source == "hypernetwork"

    @property
    def trains_a(self) -> bool:
        """Whether A, or what generates it, is trained (spec S6, G7)."""
        return self.a_source != "fixed"

    @property
    def generates_b(self) -> bool:
        """Whether B comes from the hypernetwork."""
        return self.sharing in ("full", "b")

    @property
    def seed_bound(self) -> float:
        """Bound ``1/sqrt(rank)`` of ``a_in``, hence of A's hidden pre-activation at the start (spec I5)."""
        return 1 / math.sqrt(self.rank)

    @property
    def gain_a(self) -> float:
        """Gain ``g_A`` of a generated A (spec G5)."""
        if self.gain != "transfer":
            return self.gain
        return 1 / (self.hidden_dim * mean_abs_uniform(self.activation, self.seed_bound))

    @property
    def gain_b(self) -> float:
        """Gain ``g_B`` of a generated B (spec G5)."""
        if self.gain != "transfer":
            return self.gain
        return self.gain_residual / (self.hidden_dim * mean_abs_normal(self.activation))

    @property
    def gain_residual(self) -> float:
        """Gain of the residual: 1, or ``1 / (1 + gate)`` where the gain is to transfer LoRA's rates (spec G8)."""
        return 1.0 if self.gate is None or self.gain != "transfer" else 1 / (1 + self.gate)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated anew."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values, in order; those that version 0.1 lacks only where they say something (spec F2)."""
        values = dataclasses.asdict(self)
        return {
            name: value for name, value in values.items() if name not in LATER_FIELDS or value != LATER_FIELDS[name]
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; unknown keys are an error (spec F4)."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise HoraError(
                f"AdapterSpec has the fields {known}, got also {unknown}: written by a newer version? (spec F4)"
            )
        return cls(**values)


LATER_FIELDS = {"gate": None, "tie_a": False}
"""Fields that the first adapters lack, with their defaults: written where they say something (spec F2)."""


def positive_int(name: str, value: Any) -> int:
    """`value` as an int of at least 1, or a HoraError that names it (spec S1)."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise HoraError(f"{name} must be an integer of at least 1, got {value!r} (spec S1)")
    return number


def _positive_float(name: str, value: Any, otherwise: str) -> float:
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not 0 < number <= sys.float_info.max:  # a huge int is no float either
        raise HoraError(f"{name} must be a finite number above 0, {otherwise}, got {value!r} (spec S1)")
    return float(number)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise HoraError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r} (spec S1)")
