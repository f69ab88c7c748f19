"""What a planned weight stays through: operations that move its values without mixing its axes, on w and both factors.

Each rule takes the operands of a primitive, of which at least one is a `View`, a function that applies the primitive,
and its parameters. It returns the results, or None where the weight cannot be followed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hora_jax.routes import aligned
from hora_jax.views import View

Operands = Sequence[Any]
Bind = Callable[..., list[Array]]
Rule = Callable[[Operands, Bind, Mapping[str, Any]], list[Any] | None]


def _same(ins: Operands, bind: Bind, params: Mapping[str, Any]) -> list[Any]:
    """Primitives that return each operand with its shape: constraints, barriers, names, transfers."""
    out = bind(*map(_base, ins))
    return [v.moved(w, v.a, v.b, axes=v.axes) if isinstance(v, View) else w for v, w in zip(ins, out, strict=True)]


def _cast(ins: Operands, bind: Bind, params: Mapping[str, Any]) -> list[Any] | None:
    view = ins[0]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in (params["new_dtype"], view.w.dtype)):
        return None
    return [view.moved(bind(view.w)[0], view.a, view.b)]


def _stop(ins: Operands, bind: Bind, params: Mapping[str, Any]) -> list[Any]:
    view = ins[0]
    return [view.moved(bind(view.w)[0], *map(jax.lax.stop_gradient, (view.a, view.b)), axes=view.axes)]


def _transpose(ins: Operands, bind: Bind, params: Mapping[str, Any]) -> list[Any]:
    view, order = ins[0], params["permutation"]
    axes = None if view.axes is None else tuple(view.axes[i] for i in order)
    a, b = (f.transpose(*order, view.w.ndim) for f in (view.a, view.b))
    return [view.moved(bind(view.w)[0], a, b, axes=axes)]


def _squeeze(ins: Operands, bind: Bind, params: Mapping[str, Any]) -> list[Any]:
    view, axes = ins[0], params["dimensions"]
    return [view.moved(bind(view.w)[0], view.a.squeeze(axes), view.b.squeeze(axes))]


def _expand(ins: Operands, bind: Bind, params: Mapping[str, Any]) -> list[Any] | None:
    """New axes of length one; longer ones would be copies."""
    view, shape, places = ins[0], params["shape"], params["broadcast_dimensions"]
    new = [i for i in range(len(shape)) if i not in places]
    if [shape[i] for i in places] != list(view.w.shape) or any(shape[i] != 1 for i in new):
        return None
    return [view.moved(bind(view.w)[0], jnp.expand_dims(view.a, new), jnp.expand_dims(view.b, new))]


def _reshape(ins: Operands, bind: Bind, params: Mapping[str, Any]) -> list[Any] | None:
    """Axes joined or split, as long as the joined ones belong to the same factors."""
    view, groups = ins[0], regroup(ins[0].w.shape, params["new_sizes"])
    if params.get("dimensions") is not None:
        return None
    factors = [regrouped(view, factor, groups) for factor in (view.a, view.b)]
    if any(factor is None for factor in factors):
        return None
    return [view.moved(bind(view.w)[0], factors[0], factors[1])]


def regroup(old: Sequence[int], new: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Axes of a shape and the lengths they are reshaped to, in the smallest groups of equal size."""
    groups, left, right = [], list(enumerate(old)), list(new)
    while left or right:
        axes, sizes = left[:1], right[:1]
        del left[:1], right[:1]
        while (have := math.prod(size for _, size in axes)) != (wanted := math.prod(sizes)):
            if have < wanted:
                axes.append(left.pop(0))
            else:
                sizes.append(right.pop(0))
        groups.append((tuple(axis for axis, _ in axes), tuple(sizes)))
    return groups


def regrouped(view: View, factor: Array, groups: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Array | None:
    """A factor along the regrouped axes; None where axes are joined that it does not have alike."""
    owned, shape = view.owned(factor), []
    for axes, sizes in groups:
        longer = [axis for axis in axes if view.w.shape[axis] != 1]
        has = [axis in owned for axis in longer]
        if any(has) and not all(has):
            return None
        shape += sizes if any(has) else [1] * len(sizes)
    return factor.reshape(*shape, factor.shape[-1])


def _slice(ins: Operands, bind: Bind, params: Mapping[str, Any]) -> list[Any]:
    view = ins[0]
    steps = params["strides"] or (1,) * view.w.ndim
    index = [slice(*bounds) for bounds in zip(params["start_indices"], params["limit_indices"], steps, strict=True)]
    a, b = (f[tuple(s if i in view.owned(f) else slice(None) for i, s in enumerate(index))] for f in (view.a, view.b))
    return [view.moved(bind(view.w)[0], a, b)]


def _split(ins: Operands, bind: Bind, params: Mapping[str, Any]) -> list[Any]:
    view, axis, sizes = ins[0], params["axis"], params["sizes"]
    a, b = (jax.lax.split(f, sizes, axis) if axis in view.owned(f) else [f] * len(sizes) for f in (view.a, view.b))
    return [view.moved(w, a, b) for w, a, b in zip(bind(view.w), a, b, strict=True)]


def _dynamic_slice(ins: Operands, bind: Bind, params: Mapping[str, Any]) -> list[Any]:
    view, *starts = ins

    def cut(factor: Array) -> Array:
        for axis in view.owned(factor):
            factor = jax.lax.dynamic_slice_in_dim(factor, starts[axis], params["slice_sizes"][axis], axis)
        return factor

    return [view.moved(bind(view.w, *starts)[0], cut(view.a), cut(view.b))]


def _concatenate(ins: Operands, bind: Bind, params: Mapping[str, Any]) -> list[Any] | None:
    """Several weights side by side."""
    if any(isinstance(part, View) and (part.codes or part.decoded) for part in ins):
        return None
    return [_joined(ins, bind(*map(_base, ins))[0], params["dimension"])]


def _stack(ins: Operands, bind: Bind, params: Mapping[str, Any]) -> list[Any] | None:
    """Several weights along a new axis."""
    axis = params["axis"]
    if any(isinstance(part, View) and (part.codes or part.decoded) for part in ins):
        return None
    longer = [
        part.moved(*(jnp.expand_dims(v, axis) for v in (part.w, part.a, part.b)))
        if isinstance(part, View)
        else jnp.expand_dims(part, axis)
        for part in ins
    ]
    return [_joined(longer, bind(*map(_base, ins))[0], axis)]


def _unstack(ins: Operands, bind: Bind, params: Mapping[str, Any]) -> list[Any]:
    view, axis = ins[0], params["axis"]
    count = view.w.shape[axis]
    a, b = (
        [jax.lax.index_in_dim(f, i if axis in view.owned(f) else 0, axis, keepdims=False) for i in range(count)]
        for f in (view.a, view.b)
    )
    return [view.moved(w, a, b) for w, a, b in zip(bind(view.w), a, b, strict=True)]


def _base(value: Any) -> Any:
    return value.w if isinstance(value, View) else value


def _joined(parts: Operands, w: Array, axis: int) -> View:
    """Ranks of the parts one after the other, with zeros where the whole is another part."""
    sizes, made, before = [_base(part).shape[axis] for part in parts], [], 0
    for part, size in zip(parts, sizes, strict=True):
        if isinstance(part, View):
            around = [(0, 0)] * (part.w.ndim + 1)
            around[axis] = (before, sum(sizes) - before - size)
            by_a = part.a.shape[axis] != 1
            by_b = part.b.shape[axis] != 1 or not by_a
            made.append((jnp.pad(part.a, around) if by_a else part.a, jnp.pad(part.b, around) if by_b else part.b))
        before += size
    a, b = (_side_by_side(factors) for factors in zip(*made, strict=True))
    views = [part for part in parts if isinstance(part, View)]
    constant = len(views) == len(parts) and all(view.constant for view in views)
    return View(w, a, b, " + ".join(dict.fromkeys(view.path for view in views)), constant)


def _side_by_side(factors: Sequence[Array]) -> Array:
    """Factors on the axes that any of them has, their ranks one after the other."""
    shape = jnp.broadcast_shapes(*(factor.shape[:-1] for factor in factors))
    return jnp.concatenate([jnp.broadcast_to(factor, (*shape, factor.shape[-1])) for factor in factors], -1)


def _all_gather(ins: Operands, bind: Bind, params: Mapping[str, Any]) -> list[Any] | None:
    """Shards of a weight inside `jax.shard_map`, put together along an axis; whose it is, a length of one hides."""
    view, axis = ins[0], params["all_gather_dimension"]
    if not params["tiled"]:
        return None
    alone = view.w.shape[axis] == 1
    a, b = (bind(aligned(f, view.w)[0])[0] if alone or axis in view.owned(f) else f for f in (view.a, view.b))
    return [view.moved(bind(view.w)[0], a, b)]


RULES: dict[str, Rule] = {
    "convert_element_type": _cast,
    "stop_gradient": _stop,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _expand,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "all_gather": _all_gather,
    "all_gather_invariant": _all_gather,
    **dict.fromkeys(
        (
            "copy",
            "copy_p",
            "name",
            "optimization_barrier",
            "sharding_constraint",
            "reshard",
            "mesh_cast",
            "layout_constraint",
            "device_put",
            "pvary",
            "pcast",
        ),
        _same,
    ),
}
