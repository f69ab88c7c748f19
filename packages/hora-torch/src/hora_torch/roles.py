"""Names that modules have, and what they may mean: a name proves nothing."""

import re

ROLES = {
    "q": ("q_proj", "query", "q", "q_lin", "to_q", "wq", "query_proj", "q_attn", "linear_q"),
    "k": ("k_proj", "key", "k", "k_lin", "to_k", "wk", "key_proj", "linear_k"),
    "v": ("v_proj", "value", "v", "v_lin", "to_v", "wv", "value_proj", "linear_v"),
}
"""Names of separate projections in transformers, timm and common code."""

ROLE_OF = {name: role for role, names in ROLES.items() for name in names}

FUSED = ("qkv", "qkv_proj", "c_attn", "Wqkv", "to_qkv", "query_key_value", "kv", "kv_proj", "to_kv", "qk")
"""Names of modules that may hold several projections; the class of their attention tells whether and how."""


def matches(key: str, module: str) -> bool:
    """PEFT's rule for patterns: the end of the path, as a regular expression."""
    return re.match(rf"(.*\.)?({key})$", module) is not None


def kind(part: str) -> str:
    """What a part of a fused weight is: ``q2``, the queries of a second map, is a ``q``."""
    return part.rstrip("0123456789")


def identifier(name: str) -> str:
    """A module name as the name of a projection."""
    name = re.sub(r"\W", "_", name)
    return f"_{name}" if name[:1].isdigit() else name
