"""Rules that find projections in a tree by the dotted paths of its leaves."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from operator import attrgetter
from typing import Any

import jax.numpy as jnp
from hora_spec import HoraError, Layout, ProjectionShape, Window
from jax.tree_util import GetAttrKey, SequenceKey, tree_flatten_with_path

PLACE = re.compile(r"\{l(?:\*(\d+))?(?:\+(\d+))?\}")
"""The place in a stack in a layer's name: ``{l}``, or ``{l*n+i}`` for layer i of every block of n."""


@dataclass(frozen=True, slots=True)
class Target:
    """A rule that finds one projection in every layer of a tree.

    Parameters
    ----------
    path
        Dotted path of the leaf; ``*`` is any text inside one segment, ``**`` any number of segments.
    projection
        Name of the projection: q, k, v or any identifier.
    layout
        Where the projection sits in the leaf; the einops pattern is enough. With an ``l`` axis the leaf stacks layers.
    heads
        Head count, needed where the pattern has ``(h k)``: a number, or the dotted attribute of the attention module
        that holds it, which is read when a model rather than its state is planned.
    fused
        ``(index, parts)`` when the axis of heads holds that many projections of equal size one after the other;
        ``(index, parts, blocks)`` when each of so many equal blocks of it, such as heads, holds all of them.
    layer
        Name of the layer: ``{0}``, ``{1}`` ... stand for what the wildcards matched, ``{l}`` for the place in a stack,
        ``{l*3+1}`` for the second layer of each block where a stack holds blocks of three.
        None: the path without its last two segments.
    module
        Name, inside the layer, of the PyTorch module that holds the projection in adapter files. None: the last but
        one segment of the path.

    Notes
    -----
    The layer's name fixes its initial values (spec I1) and its place in files (spec F2). Use the path that the
    attention module has in the PyTorch model, and both frameworks start from equal bits and exchange files.
    """

    path: str
    projection: str
    layout: Layout | str = "(h k) d"
    heads: int | str | None = None
    fused: tuple[int, int] | tuple[int, int, int] | None = None
    layer: str | None = None
    module: str | None = None

    def __post_init__(self) -> None:
        texts = {"path": self.path, "projection": self.projection, "layer": self.layer, "module": self.module}
        optional = ("layer", "module")
        if bad := [k for k, v in texts.items() if not ((isinstance(v, str) and v) or (v is None and k in optional))]:
            raise HoraError(f"these fields of a target are texts, got a wrong {', '.join(bad)}: {self}")
        if not isinstance(self.layout, Layout | str):
            raise HoraError(f'layout must be a Layout or a pattern such as "d h k", got {self.layout!r} (spec L1)')
        if not (self.heads is None or (isinstance(self.heads, str) and self.heads) or _is_count(self.heads)):
            raise HoraError(
                "heads must be a number of at least 1, the attribute of the attention module that holds it, or None, "
                f"got {self.heads!r} (spec S3)"
            )
        if self.fused is not None:
            _check_fused(self.fused)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_fused(fused: Any) -> None:
    index, *counts = fused if isinstance(fused, tuple) and fused else (None,)
    counted = len(counts) in (1, 2) and all(map(_is_count, counts))
    if not counted or not (_is_count(index) or index == 0) or index >= counts[0]:
        raise HoraError(
            "fused must be (index, parts) or (index, parts, blocks) with 0 <= index < parts and blocks >= 1, got "
            f"{fused!r} (spec L2)"
        )


def checked_targets(targets: Any) -> tuple[Target, ...]:
    """One or several targets as a tuple; HoraError if that is not what they are."""
    given = (targets,) if isinstance(targets, Target) else targets
    if not isinstance(given, Sequence) or not given or not all(isinstance(target, Target) for target in given):
        raise HoraError(
            f"a plan adapts what targets find, got {targets!r:.60}: pass those of a preset, or your own (spec S3)"
        )
    return tuple(given)


@dataclass(frozen=True, slots=True)
class Site:
    """One projection in one leaf: the leaf's path and shape, the layout, and the module's name in adapter files."""

    path: str
    projection: str
    layout: Layout
    shape: tuple[int, ...]
    module: str


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf with a shape: its keys in the tree and its value."""

    keys: tuple[Any, ...]
    value: Any


@dataclass(frozen=True, slots=True)
class Match:
    """A site, the shape of its projection, and the name of its layer with ``{l}`` for the place in a stack."""

    layer: str
    site: Site
    shape: ProjectionShape


def leaves(params: Any) -> dict[str, Leaf]:
    """Every leaf that has a shape, by dotted path; a Flax variable and its value have one path."""
    result = {}
    tree = nnx.state(params) if (nnx := nnx_of(params)) else params  # some modules are no pytrees
    for keys, value in tree_flatten_with_path(tree)[0]:
        if hasattr(value, "shape"):
            result[".".join(str(_name(key)) for key in _unboxed(keys))] = Leaf(keys, value)
    return result


def nnx_of(params: Any) -> Any:
    """`flax.nnx` if `params` is one of its modules, else None; it takes long to import, and may be missing."""
    nnx = sys.modules.get("flax.nnx")
    return nnx if nnx is not None and isinstance(params, nnx.Module) else None


def match(target: Target, path: str, leaf: Leaf, params: Any) -> Match | None:
    """What `target` says about a leaf of `params`, None where its path does not match.

    Raises
    ------
    HoraError
        If the layout does not fit the leaf, the head count is unknown, or the layer has no name.
    """
    hit = _regex(target.path).fullmatch(path)
    if hit is None:
        return None
    _check_dtype(leaf, path)
    layout = _layout(target, leaf.value.shape, path)
    *_, attention, module, _ = ("", "", *path.rsplit(".", 2))
    name = attention if target.layer is None else _fill(target.layer, hit.groups())
    if not name or layout.stacked is not bool(PLACE.search(name)):
        raise HoraError(
            f"a layer has a name, which holds {{l}} if and only if its leaves are stacked, got {name!r} for the layout "
            f"{layout.pattern!r} of {path}: set Target.layer (spec I1)"
        )
    site = Site(path, target.projection, layout, tuple(leaf.value.shape), target.module or module)
    return Match(name, site, _projection(target, site, leaf, params))


def _check_dtype(leaf: Leaf, path: str) -> None:
    """Floating weights, and codes that qwix keeps beside their scale."""
    keys = [_name(key) for key in leaf.keys if key != GetAttrKey("value")]
    if not jnp.issubdtype(leaf.value.dtype, jnp.floating) and keys[-2:] != ["array", "qvalue"]:
        raise HoraError(
            f"a planned weight is floating, or quantised by qwix, got {path} of dtype {leaf.value.dtype}, whose "
            "scale is unknown: plan the model before it is quantised, or quantise it with qwix (spec S3)"
        )


def _fill(template: str, captured: tuple[str, ...]) -> str:
    try:
        places = PLACE.sub(lambda place: f"{{{place[0]}}}", template)
        name = places.format(*(text.rstrip(".") for text in captured))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise HoraError(
            f"a layer's name may hold {{l}} and the {len(captured)} wildcards of its path, {{0}} the first, got "
            f"{template!r}: set Target.layer (spec I1)"
        ) from error
    return re.sub(r"\.{2,}", ".", name).strip(".")


def _layout(target: Target, shape: tuple[int, ...], path: str) -> Layout:
    layout = target.layout if isinstance(target.layout, Layout) else Layout(target.layout)
    if len(layout.axes) != len(shape):
        raise HoraError(
            f"a layout names every axis, got {layout.pattern!r} for {path} of shape {tuple(shape)}: change the layout "
            f"of target {target.path!r}, with an l where layers are stacked (spec L3)"
        )
    if target.fused is None:
        return layout
    index, parts, blocks = (*target.fused, 1)[:3]
    axis = layout.axes.index(layout.row_axes[0])
    if shape[axis] % (parts * blocks):
        raise HoraError(
            f"fused=(index, parts, blocks) needs parts in blocks to divide the axis, got "
            f"{target.fused} for axis {axis} of {path}, shape {tuple(shape)}: give a Layout with a Window instead "
            "(spec L2)"
        )
    size = shape[axis] // parts // blocks
    return Layout(layout.pattern, Window(axis, index * size, (index + 1) * size, blocks))


def _projection(target: Target, site: Site, leaf: Leaf, params: Any) -> ProjectionShape:
    sizes = dict(zip(site.layout.axes, site.layout.window_shape(site.shape), strict=True))
    shown = sizes["h"] * sizes.get("g", 1) if "h" in sizes else target.heads
    heads = shown if isinstance(target.heads, str) or target.heads is None else target.heads
    if isinstance(heads, str):
        heads = _attribute(params, _unboxed(leaf.keys)[:-2], heads, site.path)
    if heads is None:
        raise HoraError(
            f"{site.layout.pattern!r} does not show the head count of {site.path}, got heads=None: pass it (spec S3)"
        )
    if not _is_count(heads):
        raise HoraError(f"a head count is an integer of at least 1, got {heads!r} for {site.path} (spec S3)")
    rows = prod(sizes[axis] for axis in site.layout.row_axes)
    if rows % heads:
        raise HoraError(
            f"heads must divide the {rows} rows of {site.projection!r} in {site.path}, got {heads} (spec S3)"
        )
    shape = ProjectionShape(heads, rows // heads, sizes["d"])
    site.layout.check(site.shape, shape)
    return shape


def _attribute(params: Any, keys: tuple[Any, ...], name: str, path: str) -> int:
    node = params
    try:
        for key in keys:
            node = child(node, key)
        return attrgetter(name)(node)
    except AttributeError:
        raise HoraError(
            f"the head count of {path} is the attribute {name!r} of its attention module, got a tree without it: plan "
            "the model itself rather than its parameters, or pass the head count as a number (spec S3)"
        ) from None


@cache
def _regex(path: str) -> re.Pattern[str]:
    parts = [
        r"((?:[^.]+\.)*)" if segment == "**" else re.escape(segment).replace(r"\*", "([^.]*)") + r"\."
        for segment in path.split(".")
    ]
    return re.compile("".join(parts).removesuffix(r"\."))


def _unboxed(keys: tuple[Any, ...]) -> tuple[Any, ...]:
    """Keys without those that lead from a Flax variable, a Linen box or a quantised array of qwix to its values."""
    keys = keys[:-1] if keys and keys[-1] == GetAttrKey("value") else keys
    return keys[:-2] if [_name(key) for key in keys[-2:]] == ["array", "qvalue"] else keys


def child(node: Any, key: Any) -> Any:
    """The child of a module, list or dict that a key of a tree, or of a module's state, names."""
    name = _name(key)
    return getattr(node, name) if isinstance(name, str) and hasattr(node, name) else node[name]


def _name(key: Any) -> Any:
    if isinstance(key, GetAttrKey):
        return key.name
    return key.idx if isinstance(key, SequenceKey) else key.key
