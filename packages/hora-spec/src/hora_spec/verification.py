"""Files made from an adapter, read back and compared with what the adapter computes (spec F10)."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from hora_spec import reference
from hora_spec.adapter import Adapter, AdapterLayer, Site
from hora_spec.checkpoint import Checkpoint, open_checkpoint, read_tensor
from hora_spec.directory import CONFIG, read_pair
from hora_spec.errors import HoraError
from hora_spec.files import PREFIX
from hora_spec.gguf_adapter import read_gguf
from hora_spec.merged import read_floats, resolve
from hora_spec.tensors import Stored, to_numpy

Matrix = NDArray[Any]
_Part = tuple[Site, AdapterLayer, str]

_EPS = {"F16": 2.0**-10, "BF16": 2.0**-7, "F32": 2.0**-23, "F64": 2.0**-52}


def verify_export(
    adapter: Adapter, export: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None
) -> dict[str, float]:
    """How far the updates in a file are from those of the adapter it was made from (spec F10).

    Parameters
    ----------
    adapter
        The adapter.
    export
        A LoRA directory, read as PEFT reads it; a GGUF adapter, read as llama.cpp does; or a merged checkpoint.
    base
        Directory of the base, for a merged checkpoint.

    Returns
    -------
    dict
        Path of every adapted weight to ``|update - delta| / |delta|`` (Frobenius).

    Raises
    ------
    HoraError
        If an update is further from its delta than rounding explains, or if the export adapts other modules, or if a
        merged checkpoint differs from its base in anything else.
    """
    parts: dict[tuple[str, str], list[_Part]] = {}
    for layer in adapter.layers.values():
        for p, site in layer.sites.items():
            parts.setdefault((site.module, site.parameter), []).append((site, layer, p))
    if Path(export).suffix == ".gguf":
        found, eps = read_gguf(export, adapter)
    elif (Path(export) / CONFIG).exists():
        found, eps = _read_lora(Path(export))
    elif base is None:
        raise HoraError("a merged checkpoint is compared with its base, got none: pass its directory (spec F10)")
    else:
        return _verify_merged(adapter, parts, open_checkpoint(Path(export)), open_checkpoint(Path(base)))
    if odd := sorted(found.keys() ^ {module for module, _ in parts}):
        raise HoraError(f"an export adapts the modules of its adapter, got a difference in {odd[:3]} (spec F10)")
    return {
        f"{module}.{parameter}": _distance(module, found[module], _matrix(these), 8 * eps)
        for (module, parameter), these in parts.items()
    }


def _delta(parts: list[_Part]) -> Matrix:
    """Update of a weight in the form in which that is stored, float64."""
    shape = parts[0][0].weight_shape
    stored = np.zeros(shape)
    for site, layer, p in parts:
        delta = reference.delta(layer.spec, layer.shape, layer.params)[p]
        stored[site.layout.index(shape)] = site.layout.write(delta, shape)
    return stored


def _matrix(parts: list[_Part]) -> Matrix:
    """Update of a weight, (out, in)."""
    layout = parts[0][0].layout
    return rearrange(_delta(parts), f"{' '.join(layout.axes)} -> ({' '.join(layout.row_axes)}) d")


def _distance(name: str, found: Matrix, delta: Matrix, bound: float) -> float:
    if found.shape != delta.shape:
        raise HoraError(f"the update of {name} has shape {delta.shape}, got {found.shape}: export again (spec F10)")
    distance = float(np.linalg.norm(found - delta) / (np.linalg.norm(delta) or 1.0))
    if not distance <= bound:
        raise HoraError(
            f"the update of {name} is that of the adapter within {bound:.1g}, got a distance of {distance:.2g}: the "
            "file is damaged, or of another adapter; export again (spec F10)"
        )
    return distance


def _read_lora(directory: Path) -> tuple[dict[str, Matrix], float]:
    """Updates of a LoRA directory, and the precision of its numbers."""
    config, stored = read_pair(directory)
    if (kind := config.get("peft_type")) != "LORA":
        raise HoraError(f"an export has the peft_type LORA, got {kind} in {str(directory)!r} (spec F10)")
    tensors = {tensor.name.removeprefix(PREFIX): to_numpy(tensor) for tensor in stored}
    if unpaired := {n.replace("lora_A", "lora_B") for n in tensors if ".lora_A." in n} - tensors.keys():
        raise HoraError(f"each LoRA module has A and B, got no {min(unpaired)}: export again (spec F10)")
    found: dict[str, Matrix] = {}
    for module in (name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")):
        a, b = (np.asarray(tensors[f"{module}.lora_{factor}.weight"], np.float64) for factor in "AB")
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)  # those of a convolution have further axes of length one
        scaling = _value(config, "lora_alpha", "alpha_pattern", module) / _value(config, "r", "rank_pattern", module)
        if module.endswith(".base_layer.out_proj") and not b.any():
            continue  # PEFT wants one beside in_proj
        found[module] = scaling * b @ a
    return found, _precision(stored)


def _value(config: Mapping[str, Any], key: str, patterns: str, module: str) -> float:
    """A number of PEFT's config for one module: the first pattern that fits, else the default."""
    fits = (value for text, value in config.get(patterns, {}).items() if re.match(rf"(.*\.)?({text})$", module))
    return float(next(fits, config[key]))


def _precision(stored: list[Stored]) -> float:
    return max((_EPS.get(tensor.dtype, 1.0) for tensor in stored if ".lora_" in tensor.name), default=1.0)


def _verify_merged(
    adapter: Adapter, parts: Mapping[tuple[str, str], list[_Part]], merged: Checkpoint, base: Checkpoint
) -> dict[str, float]:
    """Distances of sums, of which each entry is right up to its rounding; all else is the base's."""
    whole = [name.replace(".base_layer.", ".") for name in adapter.modules]
    names = resolve([*(f"{module}.{parameter}" for module, parameter in parts), *whole], base)
    for name in sorted(base.entries.keys() | merged.entries.keys()):
        one, other = base.entries.get(name), merged.entries.get(name)
        kept = one is not None and other is not None and (one.dtype, one.shape) == (other.dtype, other.shape)
        if not kept or (name not in names.values() and read_tensor(one) != read_tensor(other)):
            raise HoraError(f"a merge changes adapted weights alone, {name} differs from the base (spec F10)")
    distances = {}
    for (module, parameter), these in parts.items():
        entry = base.entries[names[f"{module}.{parameter}"]]
        before, after, delta = (
            read_floats(entry),
            read_floats(merged.entries[names[f"{module}.{parameter}"]]),
            _delta(these),
        )
        exact, found = before + delta, after.astype(np.float64)
        summed = _EPS["F64" if entry.dtype == "F64" else "F32"] * 4 * (np.abs(before) + np.abs(delta))
        allowed = _EPS[entry.dtype] / 2 * np.abs(exact) + summed + (2.0**-25 if entry.dtype == "F16" else 0.0)
        if not (np.abs(found - exact) <= allowed).all():
            raise HoraError(
                f"{module} is the base plus its update, rounded once, got another sum: merge again (spec F10)"
            )
        distances[f"{module}.{parameter}"] = float(
            np.linalg.norm(found - before - delta) / (np.linalg.norm(delta) or 1.0)
        )
    return distances
