"""All projections of one stored weight as one pair of factors, so that the weight's input and output are read once."""

from collections.abc import Iterator, Mapping

import jax.numpy as jnp
from hora_spec import Factors, HoraError
from hora_spec.layout import Span
from jaxtyping import Array

from hora_jax.adapter import unstack
from hora_jax.plan import Layer
from hora_jax.routes import Form
from hora_jax.targets import Site


def fused(members: tuple[Layer, ...], stacked: Mapping[str, Factors]) -> Iterator[tuple[str, Form, Array, Array]]:
    """Path, form, A and ``scaling * B`` of each adapted weight of a group of layers.

    Parameters
    ----------
    members
        Layers of equal method and shape.
    stacked
        Their factors, with a leading layers axis.

    Raises
    ------
    HoraError
        If projections of one weight disagree about its axes.

    Notes
    -----
    Ranks of a weight's projections stand one after the other: A (ranks, embed) and B (rows, ranks), with zeros where a
    projection has no rows or reads no inputs; heads that own their A stand block-diagonally. Assembled for all layers
    at once, then split. A weight that stacks layers keeps their axis where it has it.
    """
    scaled = {p: Factors(f.a, members[0].spec.scaling * f.b) for p, f in stacked.items()}
    made: dict[tuple[object, ...], list[list[tuple[Array, Array]]]] = {}
    for index, layer in enumerate(members):
        by_path = _by_path(layer)
        places = tuple((site.projection, site.layout, site.shape) for site in layer.sites)
        if places not in made:
            made[places] = unstack(members, [_weight(sites, scaled) for sites in by_path.values()])
        for (path, (site, *_)), (a, b) in zip(by_path.items(), made[places][index], strict=True):
            yield path, _form(site), _placed(site, a), _placed(site, b)


def _by_path(layer: Layer) -> dict[str, tuple[Site, ...]]:
    paths = dict.fromkeys(site.path for site in layer.sites)
    return {path: tuple(site for site in layer.sites if site.path == path) for path in paths}


def _form(site: Site) -> Form:
    """Letters of one layer's weight; axes of length one, each of which may hold several maps, have their own."""
    free = iter("abcefi")
    axes = (axis for axis in site.layout.axes if axis != "l")
    return Form("".join({"hk": "o"}.get(axis, axis) if axis != "1" else next(free) for axis in axes))


def _weight(sites: tuple[Site, ...], factors: Mapping[str, Factors]) -> tuple[Array, Array]:
    """A (layers, ranks, embed) and B (layers, *rows, ranks) of all projections of one weight."""
    if len({_form(site) for site in sites}) > 1:
        got = sorted({site.layout.pattern for site in sites})
        raise HoraError(f"a weight has one order of axes, got {got} for {sites[0].path}: use one pattern (spec L1)")
    parts = [_part(site, factors[site.projection]) for site in sites]
    if len(parts) == 1:
        return parts[0]
    a, b = zip(*parts, strict=True)
    return jnp.concatenate(a, 1), jnp.concatenate(b, -1)


def _part(site: Site, factors: Factors) -> tuple[Array, Array]:
    """A and B of one projection, on all of the weight's rows and inputs."""
    a, b = factors
    layers, heads, head_dim, rank = b.shape
    if a.ndim == b.ndim:
        b = jnp.einsum("lhkr,hg->lhkgr", b, jnp.eye(heads, dtype=b.dtype)).reshape(layers, heads, head_dim, -1)
        a = a.reshape(layers, heads * rank, -1)
    form, sizes = _form(site), dict(zip(site.layout.axes, site.layout.window_shape(site.shape), strict=True))
    b = b.reshape(layers, *(1,) * len(form.maps), *(sizes[axis] for axis in site.layout.row_axes), -1)
    window, span = site.layout.window, site.layout.span(site.shape)
    if window is None or span is None:
        return a, b
    before = site.layout.axes[: window.axis]
    letter = form.weight[len(before) - before.count("l")]
    return (_spread(a, 2, span), b) if letter == "d" else (a, _spread(b, f"l{form.b}".index(letter), span))


def _spread(values: Array, axis: int, span: Span) -> Array:
    """Values of a span among zeros for the rest of the axis."""
    before, after = values.shape[:axis], values.shape[axis + 1 :]
    padding = [(0, 0)] * axis + [(0, 0), span.around] + [(0, 0)] * len(after)
    return jnp.pad(values.reshape(*before, span.blocks, -1, *after), padding).reshape(*before, span.size, *after)


def _placed(site: Site, factor: Array) -> Array:
    """A stacked factor with its layers axis where the weight has it, so that one `in_axes` serves both."""
    if not site.layout.stacked:
        return factor
    axis = site.layout.axes.index("l")
    return jnp.moveaxis(factor, 0, -1 if axis == len(site.shape) - 1 else axis)
