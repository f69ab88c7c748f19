"""All projections of one stored weight as one pair of factors, so that the weight's input and output are read once."""

from collections.abc import Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from hora_spec import Factors, HoraError, Layout, Window
from jaxtyping import Array

from hora_jax.adapter import unstack
from hora_jax.planning import Layer
from hora_jax.targets import Site

Pair = tuple[Array, Array]


def pairs(members: tuple[Layer, ...], stacked: Mapping[str, Factors]) -> Iterator[tuple[str, Array, Array]]:
    """Path, A and ``scaling * B`` of each adapted weight of a group of layers, along the weight's own axes.

    Parameters
    ----------
    members
        Layers of equal method and shape.
    stacked
        Their factors, with a leading layers axis.

    Yields
    ------
    tuple
        The path, and two arrays with the axes of the stored weight and the ranks behind them, of length one where the
        weight's axis is none of the factor's. The sum over ranks of their product is the weight's delta.

    Raises
    ------
    HoraError
        If projections of one weight disagree about its embed axis.

    Notes
    -----
    Ranks of a weight's projections stand one after the other, with zeros where a projection has no rows or reads no
    inputs; heads that own their A stand block-diagonally. Layers apart are assembled all at once, then split.
    """
    scaled = {p: Factors(f.a, members[0].spec.scaling * f.b) for p, f in stacked.items()}
    made: dict[tuple[object, ...], list[list[Pair]]] = {}
    for index, (layer, own) in enumerate(zip(members, unstack(members, scaled), strict=True)):
        by_path = _by_path(layer)
        places = tuple((site.projection, site.layout, site.shape) for site in layer.sites)
        if layer.stacked:
            found = _pairs(tuple(by_path.values()), own)
        else:
            if places not in made:
                made[places] = unstack(members, jax.vmap(partial(_pairs, tuple(by_path.values())))(scaled))
            found = made[places][index]
        for path, (a, b) in zip(by_path, found, strict=True):
            yield path, a, b


def _by_path(layer: Layer) -> dict[str, tuple[Site, ...]]:
    paths = dict.fromkeys(site.path for site in layer.sites)
    return {path: tuple(site for site in layer.sites if site.path == path) for path in paths}


def _pairs(weights: tuple[tuple[Site, ...], ...], factors: Mapping[str, Factors]) -> list[Pair]:
    return [_pair(sites, factors) for sites in weights]


def _pair(sites: tuple[Site, ...], factors: Mapping[str, Factors]) -> Pair:
    """A and B of all projections of one weight, one after the other."""
    if len({site.layout.axes.index("d") for site in sites}) > 1:
        got = sorted({site.layout.pattern for site in sites})
        raise HoraError(f"a weight has one order of axes, got {got} for {sites[0].path}: use one pattern (spec L1)")
    a, b = zip(*(_part(site, factors[site.projection]) for site in sites), strict=True)
    return (a[0], b[0]) if len(a) == 1 else (jnp.concatenate(a, -1), jnp.concatenate(b, -1))


def _part(site: Site, factors: Factors) -> Pair:
    """A and B of one projection, on all of the weight's rows and inputs."""
    a, b = factors
    *layers, heads, head_dim, rank = b.shape
    if a.ndim == b.ndim:
        b = jnp.einsum("...hkr,hg->...hkgr", b, jnp.eye(heads, dtype=b.dtype))
        a, rank = a.reshape(*layers, heads * rank, -1), heads * rank
    return _inputs(site, a), _rows(site, b.reshape(*layers, heads * head_dim, rank))


def _inputs(site: Site, a: Array) -> Array:
    """A (..., ranks, embed) along the axes of the weight."""
    axes, window = site.layout.axes, site.layout.window
    own = [i for i, axis in enumerate(axes) if axis in ("l", "d")]
    a = jnp.swapaxes(a, -1, -2)
    if [axes[i] for i in own] == ["d", "l"]:
        a = jnp.swapaxes(a, 0, 1)
    a = jnp.expand_dims(a, [i for i in range(len(axes)) if i not in own])
    return _padded(window, site.shape, a) if window is not None and axes[window.axis] == "d" else a


def _rows(site: Site, b: Array) -> Array:
    """B (..., rows, ranks) along the axes of the weight: written as a weight whose embed axis holds the ranks."""
    embed, window = site.layout.axes.index("d"), site.layout.window
    if window is None or window.axis == embed:
        return jnp.expand_dims(jnp.moveaxis(Layout(site.layout.pattern).write(b, site.shape), embed, -1), embed)
    b = jnp.expand_dims(jnp.moveaxis(site.layout.write(b, site.shape), embed, -1), embed)
    return _padded(window, site.shape, b)


def _padded(window: Window, shape: tuple[int, ...], factor: Array) -> Array:
    """A factor of the window, with zeros in the rest of the weight: around the span in each of its blocks."""
    span = window.span(shape[window.axis])
    before, after = factor.shape[: window.axis], factor.shape[window.axis + 1 :]
    around = [*((0, 0),) * (window.axis + 1), span.around, *((0, 0),) * len(after)]
    blocks = factor.reshape(*before, span.blocks, -1, *after)
    return jnp.pad(blocks, around).reshape(*before, span.size, *after)
