"""The names other libraries give to attention, and the head counts they keep; translated here and nowhere else."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from hora_spec import HoraError
from torch import nn
from transformers.pytorch_utils import Conv1D

from hora_torch.config import HoraConfig

ROLES = {
    "q": ("q_proj", "query", "q", "q_lin", "to_q", "wq", "query_proj", "q_attn", "linear_q"),
    "k": ("k_proj", "key", "k", "k_lin", "to_k", "wk", "key_proj", "linear_k"),
    "v": ("v_proj", "value", "v", "v_lin", "to_v", "wv", "value_proj", "linear_v"),
}
"""Names of separate projections in transformers, timm and common code."""

FUSED = ("qkv", "qkv_proj", "c_attn", "Wqkv", "to_qkv")
"""Names of one Linear or Conv1D whose output is q, then k, then v, each ``[head][head_dim]``."""

_INTERLEAVED = ("CodeGenAttention",)
"""Attention classes with such a name for another order, beside timm's ``head_first`` and GPT-BigCode's many heads."""

_NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_NUM_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "kv_heads")
_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim", "d_kv", "head_size")
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}


@dataclass(frozen=True, slots=True)
class Heads:
    """Head counts of one attention module."""

    query: int | None
    key_value: int | None
    head_dim: int | None
    explicit: bool

    @classmethod
    def find(cls, model: nn.Module, attention: nn.Module, name: str, config: HoraConfig) -> Self:
        """From the config of the adapter, else the attention module, its config, or the model's."""
        own_role = ROLE_OF.get(name.rpartition(".")[2]) or name.rpartition(".")[2] in FUSED
        sources: list[Any] = [attention, getattr(attention, "config", None)]
        if own_role:
            sources.append(getattr(model, "config", None))
        query = _first(sources, _NUM_HEADS) if own_role else None
        key_value = _first(sources, _NUM_KV_HEADS) or query
        explicit = config.num_heads
        if isinstance(explicit, Mapping):
            explicit = next((count for key, count in explicit.items() if matches(key, name)), None)
        if explicit is not None:
            query, key_value = explicit, config.num_kv_heads or explicit
        return cls(query, config.num_kv_heads or key_value, _first(sources[:2], _HEAD_DIM), explicit is not None)

    def of(self, role: str | None) -> int | None:
        """Head count of a projection that plays `role`."""
        return self.key_value if role in ("k", "v") else self.query

    def split(self, name: str, own: str, rows: int, cross: bool) -> list[tuple[str, int, int, int]]:
        """Name, start, width and head count of each part of a fused projection of `rows` rows."""
        query, key_value = self.query or 0, self.key_value or 0
        parts = {"q": query, "k": key_value, "v": key_value}
        if own == "c_attn" and cross:  # GPT-2: the query has a projection of its own
            del parts["q"]
        total = sum(parts.values())
        head_dim, rest = divmod(rows, total)
        if rest or (self.head_dim and self.head_dim != head_dim):
            raise HoraError(
                f"{name!r} has {rows} output rows, which are not {parts} heads of width {self.head_dim or head_dim} in "
                "the order q, k, v: pass num_heads and num_kv_heads, or leave it out of target_modules"
            )
        starts, start = [], 0
        for part, count in parts.items():
            starts.append((part, start, count * head_dim, count))
            start += count * head_dim
        return starts


def is_interleaved(attention: nn.Module, module: nn.Module, own: str) -> bool:
    """Whether the rows of a fused weight come in another order than all of q, then k, then v."""
    if own == "c_attn" and not isinstance(module, Conv1D):
        return not getattr(attention, "multi_query", False)
    return bool(getattr(attention, "head_first", False)) or type(attention).__name__ in _INTERLEAVED


def matches(key: str, module: str) -> bool:
    """PEFT's rule for patterns: the end of the path, as a regular expression."""
    return re.match(rf"(.*\.)?({key})$", module) is not None


def _first(sources: Iterable[Any], names: tuple[str, ...]) -> int | None:
    for source in sources:
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None
