"""The joint start of A: directions in which the loss wants all heads of a layer to read, found once (spec I7).

A backend measures products of the mean gradient G of a weight, which it never forms; the linear algebra is here, once
for all backends, in float64. Axes: l probes, d embed, n rows (heads * head_dim), r rank.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from hora_spec.errors import HoraError
from hora_spec.init import normal, raw_stream
from hora_spec.shapes import LayerShape, ProjectionShape, name_of_a
from hora_spec.spec import AdapterSpec

Array = NDArray[Any]
Probes = dict[str, dict[str, Array]]
"""Layer name to projection to array."""

Source = Literal["gradient", "inputs"]
Scale = Literal["kaiming", "rows"]

RESOLVED = 1e-6
"""A singular value below this part of the largest is float32's noise, its direction arbitrary."""


LOSS_SCALE = 2.0**15
"""What backends multiply the loss by while they measure, or less where that is no longer finite: gradients in float16
would vanish without, unnoticed. A power of two, so that products in 32 bits keep their bits."""

MOST_BATCHES = 256
"""So many are kept for all passes; a whole loader, or one without end, is a mistake."""


def few(batches: Iterable[Any]) -> list[Any]:
    """All batches of a start, which are gone through several times.

    Raises
    ------
    HoraError
        If there are none, or more than `MOST_BATCHES` (spec I7).
    """
    found = list(islice(batches, MOST_BATCHES + 1))
    if not found:
        raise HoraError("a joint start is that of some batches, got none (spec I7)")
    if len(found) > MOST_BATCHES:
        raise HoraError(
            f"a joint start keeps its batches, got more than {MOST_BATCHES}: give a handful, such as "
            "itertools.islice(loader, 4) (spec I7)"
        )
    return found


class Moments(NamedTuple):
    """Of the inputs x of one projection, means over tokens.

    Attributes
    ----------
    probed
        (l, d): ``Q E[x x^T]`` for the probes Q that were given.
    square
        ``E[x^T x]``.
    """

    probed: Array
    square: float


class Measure(NamedTuple):
    """What a backend measures on a fixed set of batches, at a delta of zero.

    G is the gradient of the mean loss with respect to the canonical weight (heads * head_dim, embed) of a projection.

    Attributes
    ----------
    left
        ``(n, l) -> (l, d)``: ``P^T G`` for every projection of every layer.
    right
        ``(l, d) -> (n, l)``: ``G Q^T``.
    inputs
        ``(l, d) -> Moments``.
    """

    left: Callable[[Probes], Probes]
    right: Callable[[Probes], Probes]
    inputs: Callable[[Probes], dict[str, dict[str, Moments]]]


class JointStart(NamedTuple):
    """Start values of A, and how clear they were.

    Attributes
    ----------
    params
        Layer name to canonical name to float32 array (rank, embed).
    spectra
        Layer name to canonical name to the singular values, largest first, of which the first `rank` were taken. Where
        that of the last one taken and the next are close, another set of batches would have taken another direction.
    """

    params: Probes
    spectra: Probes


class _Unit(NamedTuple):
    """Projections of a layer that get one basis."""

    layer: str
    spec: AdapterSpec
    shapes: dict[str, ProjectionShape]

    @property
    def embed(self) -> int:
        return next(iter(self.shapes.values())).embed_dim

    @property
    def rows(self) -> int:
        return sum(shape.weight_shape[0] for shape in self.shapes.values())

    def width(self, oversample: int) -> int:
        """Number of probes."""
        return min(self.spec.rank + oversample, self.embed, self.rows)


_Found = tuple[Array, Array]
"""Basis (r, d) and singular values."""


def joint_start(
    layers: Mapping[str, tuple[AdapterSpec, LayerShape]],
    measure: Measure,
    *,
    of: Source = "gradient",
    scale: Scale = "kaiming",
    together: bool = False,
    power: int = 1,
    oversample: int = 8,
    seed: int = 0,
) -> JointStart:
    """The A of every projection: the first right singular vectors of its mean loss gradient, all heads stacked.

    Parameters
    ----------
    layers
        Layer name to spec and shapes; their heads must share a free or fixed A.
    measure
        What the backend measures.
    of
        ``"gradient"``: of the loss. ``"inputs"``: principal directions of the layer's inputs instead, which need no
        backward pass.
    scale
        ``"kaiming"``: A x has the root mean square that a Kaiming A gives such inputs, so that learning rates of LoRA
        hold. ``"rows"``: rows of norm ``1 / sqrt(3)``, that of a Kaiming A's rows.
    together
        One basis for all projections of a layer, which a tied A has anyway.
    power, oversample
        Power steps and additional probes of the range finder; each power step costs two passes over the batches.
    seed
        Of the first probes.

    Raises
    ------
    HoraError
        If A is generated or per head, a gradient is zero, not finite or of a rank below the adapter's, or widths differ
        where one basis serves several projections (spec I7, S8).

    Notes
    -----
    Randomised range finder with power steps and a Rayleigh-Ritz step (Halko, Martinsson, Tropp 2011, algorithms 4.4 and
    5.1). The probes are the specification's, so that two backends that measure the same gradients find the same basis
    up to rounding; the sign of a row makes its entry of largest magnitude positive. Ours.
    """
    _one_of("of", of, Source)
    _one_of("scale", scale, Scale)
    units = [unit for name, (spec, layer) in layers.items() for unit in _units(name, spec, layer, together=together)]
    search = _of_gradient if of == "gradient" else _of_inputs
    found = search(units, measure, power, oversample, seed)

    bases = [basis for basis, _ in found]
    moments = measure.inputs(_for_each(units, bases)) if scale == "kaiming" else {}
    result = JointStart({name: {} for name in layers}, {name: {} for name in layers})
    for unit, (basis, spectrum) in zip(units, found, strict=True):
        factor = _kaiming(unit, basis, moments[unit.layer]) if moments else 3**-0.5
        for p in unit.shapes:
            key = name_of_a(unit.spec, p)
            result.params[unit.layer][key] = (factor * basis).astype(np.float32)
            result.spectra[unit.layer][key] = spectrum
    return result


def _units(name: str, spec: AdapterSpec, layer: LayerShape, *, together: bool) -> list[_Unit]:
    if not spec.shares_a or spec.generates_a:
        raise HoraError(
            f"a joint start is that of a free or fixed A which heads share, got sharing={spec.sharing!r} and a_source="
            f'{spec.a_source!r}: use sharing="full" or "a" with a_source="fixed" or "direct" (spec I7)'
        )
    groups = [tuple(layer)] if together or spec.tie_a else [(p,) for p in layer]
    units = [_Unit(name, spec, {p: layer[p] for p in group}) for group in groups]
    for unit in units:
        if len({shape.embed_dim for shape in unit.shapes.values()}) > 1:
            raise HoraError(f"one basis for several projections needs equal input widths, got {unit.shapes} (spec S8)")
        if spec.rank > min(unit.rows, unit.embed):
            raise HoraError(
                f"a gradient of {unit.rows} rows and {unit.embed} columns has no {spec.rank} directions: lower the "
                f"rank of {name!r} (spec I7)"
            )
    return units


def _of_gradient(units: list[_Unit], measure: Measure, power: int, oversample: int, seed: int) -> list[_Found]:
    probes = []
    for unit in units:
        width = unit.width(oversample)
        drawn = {
            p: raw_stream(seed, unit.layer, f"joint.{p}", s.weight_shape[0] * width) for p, s in unit.shapes.items()
        }
        probes.append({p: normal(raw).reshape(-1, width) for p, raw in drawn.items()})
    bases = _span(units, measure.left(_merged(units, probes)))
    for _ in range(power):
        products = [
            _stacked(unit, measured) for unit, measured in _of_each(units, measure.right(_for_each(units, bases)))
        ]
        probes = [_split(unit, np.linalg.qr(product)[0]) for unit, product in zip(units, products, strict=True)]
        bases = _span(units, measure.left(_merged(units, probes)))
    measured = measure.right(_for_each(units, bases))
    found = []
    for (unit, products), basis in zip(_of_each(units, measured), bases, strict=True):
        _, spectrum, turn = np.linalg.svd(_finite(unit, _stacked(unit, products)), full_matrices=False)
        found.append((_taken(unit, spectrum, turn @ basis), spectrum))
    return found


def _of_inputs(units: list[_Unit], measure: Measure, power: int, oversample: int, seed: int) -> list[_Found]:
    bases = []
    for unit in units:
        width = unit.width(oversample)
        drawn = normal(raw_stream(seed, unit.layer, "joint.inputs", width * unit.embed))
        bases.append(np.linalg.qr(drawn.reshape(-1, width))[0].T)
    for _ in range(power + 1):
        bases = _span(units, _probed(measure.inputs(_for_each(units, bases))))
    measured = _probed(measure.inputs(_for_each(units, bases)))
    found = []
    for (unit, probed), basis in zip(_of_each(units, measured), bases, strict=True):
        square = _finite(unit, _total(probed)) @ basis.T
        values, turn = np.linalg.eigh((square + square.T) / 2)
        spectrum = np.sqrt(np.maximum(values[::-1], 0))
        found.append((_taken(unit, spectrum, turn.T[::-1] @ basis), spectrum))
    return found


def _span(units: list[_Unit], measured: Probes) -> list[Array]:
    """Orthonormal rows (l, d) that span what was measured, summed over the projections of a unit."""
    return [np.linalg.qr(_finite(unit, _total(parts)).T)[0].T for unit, parts in _of_each(units, measured)]


def _taken(unit: _Unit, spectrum: Array, directions: Array) -> Array:
    """The first directions, each with the sign that makes its largest entry positive."""
    rank = unit.spec.rank
    if not spectrum[rank - 1] > RESOLVED * spectrum[0]:
        clear = int((spectrum > RESOLVED * spectrum[0]).sum()) if spectrum[0] > 0 else 0
        raise HoraError(
            f"what {sorted(unit.shapes)} of {unit.layer!r} should read has {clear} clear directions, rank {rank} asks "
            "for more: give more or larger batches, check that the loss depends on the layer, or lower the rank "
            "(spec I7)"
        )
    basis = directions[:rank]
    largest = np.take_along_axis(basis, np.abs(basis).argmax(1)[:, None], 1)
    return basis * np.where(largest < 0, -1.0, 1.0)


def _kaiming(unit: _Unit, basis: Array, moments: Mapping[str, Moments]) -> float:
    """Factor that gives A x the mean square of a Kaiming A's, ``E[x^T x] / (3 embed)`` a row."""
    energy = float(np.mean([(moments[p].probed * basis).sum() for p in unit.shapes]))
    square = float(np.mean([moments[p].square for p in unit.shapes]))
    if not (np.isfinite(energy) and energy > 0):
        raise HoraError(f"inputs of {unit.layer!r} have no part in what it should read, got {energy} (spec I7)")
    return (unit.spec.rank * square / (3 * unit.embed * energy)) ** 0.5


def _finite(unit: _Unit, array: Array) -> Array:
    if not np.isfinite(array).all():
        raise HoraError(
            f"gradients are finite, got NaN or infinity in {unit.layer!r}: check loss and batches (spec I7)"
        )
    return np.asarray(array, np.float64)


def _of_each(units: list[_Unit], measured: Probes) -> list[tuple[_Unit, dict[str, Array]]]:
    return [(unit, {p: measured[unit.layer][p] for p in unit.shapes}) for unit in units]


def _for_each(units: list[_Unit], bases: list[Array]) -> Probes:
    return _merged(units, [dict.fromkeys(unit.shapes, basis) for unit, basis in zip(units, bases, strict=True)])


def _merged(units: list[_Unit], parts: Iterable[Mapping[str, Array]]) -> Probes:
    result: Probes = {}
    for unit, part in zip(units, parts, strict=True):
        result.setdefault(unit.layer, {}).update(part)
    return result


def _total(parts: Mapping[str, Array]) -> Array:
    return np.sum(list(parts.values()), axis=0)


def _stacked(unit: _Unit, parts: Mapping[str, Array]) -> Array:
    return np.concatenate([np.asarray(parts[p], np.float64) for p in unit.shapes])


def _split(unit: _Unit, rows: Array) -> dict[str, Array]:
    ends = np.cumsum([shape.weight_shape[0] for shape in unit.shapes.values()])[:-1]
    return dict(zip(unit.shapes, np.split(rows, ends), strict=True))


def _probed(moments: Mapping[str, Mapping[str, Moments]]) -> Probes:
    return {name: {p: moment.probed for p, moment in layer.items()} for name, layer in moments.items()}


def _one_of(name: str, value: str, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise HoraError(f"{name} must be one of {get_args(allowed)}, got {value!r} (spec I7)")
