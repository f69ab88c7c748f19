"""Which leaves of a pytree are adapted, and how: decided once, from shapes alone.

A plan is frozen, hashable data. It knows paths and shapes, no arrays and no modules, so one plan serves a Flax NNX
model, its state, a Linen or plain dict, an Equinox module, and `jax.eval_shape` of any of them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import chain, combinations, groupby, pairwise
from operator import attrgetter
from typing import Any

from hora_spec import AdapterSpec, HoraError, LayerShape, count_params, param_shapes

from hora_jax.targets import PLACE, Match, Site, Target, checked_targets, leaves, match


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention module of the tree; where leaves stack layers, all of them together.

    Attributes
    ----------
    name
        Name of the module: the layer's, or with ``*`` for the place in a stack.
    names
        Names of the layers, in stacking order; one unless stacked.
    spec, shape
        Method and shape, the same for all of them.
    sites
        Where each projection sits, in the order of the targets.
    """

    name: str
    names: tuple[str, ...]
    spec: AdapterSpec
    shape: LayerShape
    sites: tuple[Site, ...]

    def __post_init__(self) -> None:
        param_shapes(self.spec, self.shape)  # refuses what does not fit together

    @property
    def stacked(self) -> bool:
        """Whether the leaves hold several layers, so that factors keep a leading layers axis."""
        return self.sites[0].layout.stacked


@dataclass(frozen=True, slots=True)
class Plan:
    """All adapted layers of a tree, in natural order of their names."""

    layers: tuple[Layer, ...]

    def groups(self) -> dict[str, tuple[Layer, ...]]:
        """Layers of equal method and shape, whose parameters are stacked; named after the first of them."""
        groups: dict[tuple[AdapterSpec, LayerShape], list[Layer]] = {}
        for layer in self.layers:
            groups.setdefault((layer.spec, layer.shape), []).append(layer)
        return {members[0].name: tuple(members) for members in groups.values()}

    @property
    def params_count(self) -> int:
        """Number of trainable values."""
        return sum(len(layer.names) * count_params(layer.spec, layer.shape) for layer in self.layers)

    def report(self) -> str:
        """Layers, layouts and parameters as text, one block for each group of equal layers."""
        lines = []
        for members in self.groups().values():
            names = [name for layer in members for name in layer.names]
            spec, shape = members[0].spec, members[0].shape
            span = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
            lines.append(
                f"{span}: layers={len(names)} rank={spec.rank} params={len(names) * count_params(spec, shape):,}"
            )
            lines += [_describe(site, shape) for site in members[0].sites]
        count = sum(len(layer.names) for layer in self.layers)
        return "\n".join([*lines, f"total: layers={count} params={self.params_count:,}"])


def check_plan(plan: Any) -> Plan:
    """The plan; HoraError if it is none."""
    if not isinstance(plan, Plan):
        raise HoraError(f"a plan is what hora_jax.make_plan returns, got {plan!r:.60}: check the order of arguments")
    return plan


def make_plan(params: Any, spec: AdapterSpec | Mapping[str, AdapterSpec], targets: Target | Sequence[Target]) -> Plan:
    """Find the targets in a tree.

    Parameters
    ----------
    params
        Any pytree of arrays or shapes: a model, its state, a dict of parameters, `jax.eval_shape` of them.
    spec
        The method; or one for each layer name found.
    targets
        What to adapt; `hora_jax.presets` has the rules of known models. Alternatives may be listed: every projection
        must match somewhere, and every layer must hold all of them. List projections in the order their modules have
        in the PyTorch model: the first one names the layer's tensors in adapter files (spec F2).

    Returns
    -------
    Plan
        The same for a model and its state, whatever the order of the tree's keys.

    Raises
    ------
    HoraError
        If a projection matches nothing or twice, shapes do not fit, or a head count is unknown.

    Examples
    --------
    >>> import jax
    >>> params = {"attn": {"q": {"kernel": jax.ShapeDtypeStruct((16, 4, 4), "float32")}}}
    >>> print(make_plan(params, AdapterSpec(rank=2), Target("*.q.kernel", "q", "d h k")).report())
    attn: layers=1 rank=2 params=2,112
      q: heads=4 head_dim=4 embed=16, 'd h k' in attn.q.kernel (16, 4, 4)
    total: layers=1 params=2,112
    """
    targets = checked_targets(targets)
    if not isinstance(spec, AdapterSpec) and not (
        isinstance(spec, Mapping) and all(isinstance(own, AdapterSpec) for own in spec.values())
    ):
        raise HoraError(f"the method is an AdapterSpec, or one for each layer name, got {spec!r:.60}: AdapterSpec(8)")
    found = leaves(params)
    matches = [hit for t in targets for path, leaf in found.items() if (hit := match(t, path, leaf, params))]
    _check_matched(targets, matches, list(found))
    order = {p: i for i, p in enumerate(dict.fromkeys(target.projection for target in targets))}
    matches.sort(key=lambda hit: (_natural(hit.layer), order[hit.site.projection], hit.site.path))
    layers = [_layer(name, list(members), spec) for name, members in groupby(matches, attrgetter("layer"))]
    _check_complete(targets, layers)
    every = [name for layer in layers for name in layer.names]
    names = set(every)
    if twice := sorted(name for name in names if every.count(name) > 1):
        raise HoraError(f"layers have names of their own, got {twice[:3]} twice: set Target.layer (spec I1)")
    if not isinstance(spec, AdapterSpec) and (unknown := sorted(spec.keys() - names)):
        raise HoraError(f"specs by layer name layers of the tree, got also {unknown}: widen the targets")
    return Plan(tuple(layers))


def _layer(template: str, matches: list[Match], spec: AdapterSpec | Mapping[str, AdapterSpec]) -> Layer:
    sites = tuple(hit.site for hit in matches)
    for first, second in pairwise(sites):
        if first.projection == second.projection:
            raise HoraError(
                f"a projection of a layer is matched once, got {first.path} and {second.path} for "
                f"{first.projection!r} of {template}: narrow the targets' paths, or name their layers apart"
            )
    depths = {site.shape[site.layout.axes.index("l")] if site.layout.stacked else 1 for site in sites}
    if len(depths) > 1:
        raise HoraError(f"the leaves of {template} stack equally many layers, got {sorted(depths)}: check the layouts")
    names = tuple(PLACE.sub(partial(_place, i), template) for i in range(depths.pop()))
    shape = LayerShape({hit.site.projection: hit.shape for hit in matches})
    name = PLACE.sub(lambda place: "*" if place[0] == "{l}" else place[0][1:-1], template)
    return Layer(name, names, _spec_of(spec, names), shape, sites)


def _place(index: int, place: re.Match[str]) -> str:
    """Number of a layer in the model, from its place in the stack."""
    return str(index * int(place[1] or 1) + int(place[2] or 0))


def _spec_of(spec: AdapterSpec | Mapping[str, AdapterSpec], names: tuple[str, ...]) -> AdapterSpec:
    if isinstance(spec, AdapterSpec):
        return spec
    if missing := [name for name in names if name not in spec]:
        raise HoraError(f"specs by layer cover every layer found, got none for {missing}: narrow the targets")
    if len({spec[name] for name in names}) > 1:
        raise HoraError(f"stacked layers share one spec, got several in {names[0]} ... {names[-1]}: unstack them")
    return spec[names[0]]


def _check_matched(targets: tuple[Target, ...], matches: list[Match], paths: list[str]) -> None:
    if missing := {t.projection for t in targets} - {hit.site.projection for hit in matches}:
        wanted = [t.path for t in targets if t.projection in missing]
        different = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", path) for path in paths))
        near = get_close_matches(wanted[0].replace("**.", ""), different, n=6, cutoff=0.0)
        raise HoraError(f"every projection matches a leaf, got none for {wanted}: the nearest paths are {near}")
    by_path: dict[str, list[Site]] = {}
    for hit in matches:
        by_path.setdefault(hit.site.path, []).append(hit.site)
    for first, second in chain.from_iterable(combinations(sites, 2) for sites in by_path.values()):
        if first.layout.overlaps(second.layout, first.shape):
            raise HoraError(
                f"a part of a leaf is adapted once, got {first.projection!r} and {second.projection!r} in "
                f"{first.path}: narrow the targets' paths, or use fused= or a Window (spec L2)"
            )


def _check_complete(targets: tuple[Target, ...], layers: list[Layer]) -> None:
    wanted = {target.projection for target in targets}
    for layer in layers:
        if missing := sorted(wanted - set(layer.shape)):
            raise HoraError(
                f"a layer holds every targeted projection, got {layer.name} without {missing}: narrow the targets, or "
                "name the layer in them so that the projections meet"
            )


def _describe(site: Site, shape: LayerShape) -> str:
    p, window = shape[site.projection], site.layout.window
    part = f"[{site.layout.span(site.shape)} of axis {window.axis}]" if window else ""
    return (
        f"  {site.projection}: heads={p.num_heads} head_dim={p.head_dim} embed={p.embed_dim}, "
        f"{site.layout.pattern!r} in {site.path}{part} {site.shape}"
    )


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]
