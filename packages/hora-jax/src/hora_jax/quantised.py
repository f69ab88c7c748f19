"""Weights stored as integer codes, followed to what they stand for: through tables and casts to one scale."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from hora_jax.follow import RULES, regroup, regrouped
from hora_jax.views import View

_ELEMENTWISE = (
    *("add", "sub", "rem", "abs", "neg", "clamp", "max", "min", "select_n"),
    *("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not"),
    *("shift_left", "shift_right_logical", "shift_right_arithmetic"),
    *("convert_element_type", "bitcast_convert_type"),
)
_REARRANGED = ("reshape", "squeeze", "broadcast_in_dim")


def follow_codes(name: str, ins: Sequence[Any], bind: Callable[..., list[Array]], params: Mapping[str, Any]) -> Any:
    """Results of a primitive on codes, None where they cannot be followed.

    Codes become the weight where floating numbers, made from them one by one, are multiplied by a scale. Until then an
    operation changes what the codes are, never which entry of the weight they belong to.
    """
    views = [v for v in ins if isinstance(v, View)]
    if len({view.path for view in views}) > 1 or not all(view.codes for view in views):
        return None
    view, arrays = views[0], [v.w if isinstance(v, View) else v for v in ins]
    if name in _REARRANGED or name == "gather":
        (w,) = bind(*arrays)
        looked_up = name != "gather" or (not isinstance(ins[0], View) and w.shape in (view.w.shape, view.w.shape[:-1]))
        return [_folded(view, w)] if w.size == view.w.size and looked_up else None
    if name == "mul" and jnp.issubdtype(view.w.dtype, jnp.floating) and len(views) == 1:
        (w,) = bind(*arrays)
        whole = w.shape == view.w.shape == _shape(view)
        return [replace(view, w=w, codes=False, decoded=True, axes=None)] if whole else None
    if name in _ELEMENTWISE:
        (w,) = bind(*arrays)
        return [replace(view, w=w, axes=None)] if w.shape == view.w.shape else None
    rule = RULES.get(name)
    return rule(ins, bind, params) if rule and view.w.shape == _shape(view) else None


def _shape(view: View) -> tuple[int, ...]:
    """Shape of the weight that the factors describe; codes may be folded otherwise for a while."""
    return jnp.broadcast_shapes(view.a.shape[:-1], view.b.shape[:-1])


def _folded(view: View, w: Array) -> View:
    """Codes in another shape and the same order; the factors follow as soon as their axes are apart again."""
    shape = _shape(view)
    unfolded = replace(view, w=jnp.broadcast_to(jnp.zeros((), view.w.dtype), shape))
    factors = [regrouped(unfolded, f, regroup(shape, w.shape)) for f in (view.a, view.b)]
    a, b = (view.a, view.b) if any(f is None for f in factors) else factors
    return replace(view, w=w, a=a, b=b, axes=None)
