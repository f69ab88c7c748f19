"""Named settings of the method: what each shares, in fields of `AdapterSpec`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from hora_spec.errors import HoraError
from hora_spec.spec import AdapterSpec


class Preset(NamedTuple):
    """Fields of `AdapterSpec` that differ from its defaults, and what they make of the method."""

    fields: Mapping[str, Any]
    what: str


def _preset(what: str, **fields: Any) -> Preset:
    return Preset(MappingProxyType(fields), what)


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "hora": _preset("the default: a common A, B of all heads from one hypernetwork"),
        "paper": _preset(
            "the paper's reading: A and B from the hypernetwork, gain 1",
            hidden_dim=20,
            head_embed_dim=20,
            a_source="hypernetwork",
            gain=1.0,
        ),
        "residual": _preset("a generated B plus a free part", residual=True),
        "gated": _preset("a generated B plus a free part that a learned gate weighs", residual=True, gate=1.0),
        "lora": _preset("LoRA: a common A and a free B", sharing="a"),
        "tied-lora": _preset("LoRA with one A for all projections of a layer", sharing="a", tie_a=True),
        "joint": _preset(
            "a common A that is computed once and then fixed, and a free B", sharing="a", a_source="fixed"
        ),
        "multi-head-lora": _preset("a free A and a free B per head: nothing is shared", sharing="none"),
    }
)
"""Name to setting; ``HoraConfig(r=8, **PRESETS["residual"].fields)`` uses one on torch."""


def preset(name: str, rank: int, **changes: Any) -> AdapterSpec:
    """The setting called `name` at a rank, with some fields changed.

    Raises
    ------
    HoraError
        If there is no such setting, or the result is no valid spec (spec S1, S2).

    Examples
    --------
    >>> preset("lora", 8, alpha=16).scaling
    2.0
    """
    if name not in PRESETS:
        raise HoraError(f"a setting is one of {', '.join(PRESETS)}, got {name!r} (spec S1)")
    return AdapterSpec(rank, **{**PRESETS[name].fields, **changes})
