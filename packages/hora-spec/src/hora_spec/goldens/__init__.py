"""Goldens: stored cases that say, to the last digit, what the reference computed when the specification was fixed.

One safetensors file per case, in a folder per version of the cases; a version is never edited, only added to by the
next. Inputs are float32 numbers, so every backend gets the same; outputs are float64.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from hora_spec.errors import HoraError
from hora_spec.reference import Factors
from hora_spec.shapes import LayerShape, ProjectionShape
from hora_spec.spec import AdapterSpec

Array = NDArray[Any]

VERSION = 2
"""Newest version of the cases."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Golden:
    """One stored case; all mappings but `params` and `grads` go from projection to array.

    Parameters
    ----------
    name
        Its method and layer in words.
    spec, layer, seed, regime
        What the case is; a `hora_spec.testing.Case` of these draws the same inputs again.
    params
        Canonical parameters, float32.
    x
        Tokens (batch, seq, embed), float32.
    weight
        Frozen canonical weight (heads * head_dim, embed), float32.
    bias
        (heads * head_dim,), float32, or None.
    cotangent
        Gradient with respect to the delta, (heads * head_dim, embed), float32.
    factors, delta
        What the parameters generate, float64.
    y
        Adapted projection of `x`, float64.
    merged
        ``weight + delta``, rounded once to float32.
    grads
        Gradient of ``sum_p <cotangent_p, delta_p>`` with respect to each parameter, float64.
    """

    name: str
    spec: AdapterSpec
    layer: LayerShape
    seed: int
    regime: str
    params: dict[str, Array]
    x: dict[str, Array]
    weight: dict[str, Array]
    bias: dict[str, Array | None]
    cotangent: dict[str, Array]
    factors: dict[str, Factors]
    delta: dict[str, Array]
    y: dict[str, Array]
    merged: dict[str, Array]
    grads: dict[str, Array]

    def __repr__(self) -> str:
        return f"load_goldens()[{self.name!r}]"


def load_goldens(version: int | None = None) -> dict[str, Golden]:
    """Stored cases by name.

    Parameters
    ----------
    version
        The cases that this version added, in folder ``v{version}``; by default those of all versions.

    Returns
    -------
    dict
        Name to `Golden`, in the order of names.

    Raises
    ------
    HoraError
        If there are none: a test over them would prove nothing.

    Examples
    --------
    >>> golden = load_goldens()["full-direct-leaky_relu-transfer-one_head"]
    >>> golden.spec.rank, golden.delta["q"].shape
    (3, (3, 5))
    """
    if version is None:
        return {name: golden for each in range(1, VERSION + 1) for name, golden in load_goldens(each).items()}
    goldens = [_parse(name, data) for name, data in stored_files(f"v{version}")]
    if not goldens:
        raise HoraError(f"goldens are stored in versions 1 to {VERSION}, got none for version {version}: reinstall")
    return {golden.name: golden for golden in goldens}


def stored_files(folder: str) -> list[tuple[str, bytes]]:
    """Names and contents of the safetensors files in a folder of this package, by name; none if it is absent."""
    place = files("hora_spec.goldens") / folder
    found = sorted(place.iterdir(), key=lambda file: file.name) if place.is_dir() else []
    return [(file.name, file.read_bytes()) for file in found if file.name.endswith(".safetensors")]


def _parse(file: str, data: bytes) -> Golden:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = json.loads(header["__metadata__"]["golden"])
    tensors: dict[str, dict[str, Array]] = defaultdict(dict)
    for key, value in load(data).items():
        kind, _, name = key.partition(".")
        tensors[kind][name] = value
    layer = LayerShape({p: ProjectionShape(*shape) for p, shape in about["layer"].items()})
    return Golden(
        name=file.removesuffix(".safetensors"),
        spec=AdapterSpec.from_dict(about["spec"]),
        layer=layer,
        seed=about["seed"],
        regime=about["regime"],
        params=tensors["params"],
        x=tensors["x"],
        weight=tensors["weight"],
        bias={p: tensors["bias"].get(p) for p in layer},
        cotangent=tensors["cotangent"],
        factors={p: Factors(np.asarray(tensors["factor_a"][p]), tensors["factor_b"][p]) for p in layer},
        delta=tensors["delta"],
        y=tensors["y"],
        merged=tensors["merged"],
        grads=tensors["grads"],
    )
