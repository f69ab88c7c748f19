"""An adapter summed into a checkpoint on disk, tensor by tensor (spec M1, M3)."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hora_spec import reference
from hora_spec.adapter import Adapter, AdapterLayer, Site, check_adapter
from hora_spec.checkpoint import Checkpoint, Entry, open_checkpoint, read_tensor, rewrite
from hora_spec.directory import CONFIG
from hora_spec.errors import HoraError
from hora_spec.staging import new_directory

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and their total."""

Check = Callable[[str, NDArray[Any]], None]
"""Called with the path of a weight in the adapted model and its values in a checkpoint."""

_BLOCK = 1 << 20
"""Entries that are rounded at once, so that no second tensor is in memory."""

_FLOATS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}


def save_merged(
    adapter: Adapter,
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    check: Check | None = None,
) -> list[str]:
    """Write a model with an adapter merged into it, which any server loads like the base (spec M1, M3).

    The sum is made in float32 (float64 for a float64 base) and rounded once. One tensor is in memory at a time;
    everything else is copied: the other tensors, the shards and their index, configs, tokenizer and code.

    Parameters
    ----------
    adapter
        The adapter. Tensors trained whole replace those of the checkpoint.
    base
        Directory of the base model, with safetensors as `transformers` saves them.
    out
        New or empty directory; it appears when all is written. What a killed merge has left is taken over.
    progress
        Called with the bytes written so far and their total.
    check
        Called with the path in the adapted model of each weight that gets a delta, and its values in `base`; what it
        raises is passed on, and nothing has been written then.

    Returns
    -------
    list of str
        Names of the tensors that were changed, in the checkpoint's own words.

    Raises
    ------
    HoraError
        If the base is quantised, has an adapter in its directory, lacks a tensor or has another shape, ties a changed
        tensor to another one, or a sum is not finite in its dtype. Nothing has been written then.

    Notes
    -----
    Modules are found by their path. Where a checkpoint was saved from inside or outside the model that was adapted, as
    ``model.layers`` for ``layers``, one prefix is added to all paths or taken from all; if more than one fits, none is
    taken.
    """
    check_adapter(adapter)
    checkpoint = open_checkpoint(Path(base))
    _check_full_precision(checkpoint)
    _check_bare(checkpoint)
    changes = _changes(adapter, checkpoint, check)
    with new_directory(Path(out)) as directory:
        rewrite(checkpoint, directory, changes, progress)
    return list(changes)


Change = Callable[[Entry], bytes]
"""From the place of a tensor to its new bytes."""


def _changes(adapter: Adapter, checkpoint: Checkpoint, check: Check | None) -> dict[str, Change]:
    """What becomes of each changed tensor, checked as far as possible without reading the base."""
    parts: dict[str, list[_Part]] = {}
    for layer in adapter.layers.values():
        for p, site in layer.sites.items():
            parts.setdefault(f"{site.module}.{site.parameter}", []).append((site, layer, p))
    whole = {name.replace(".base_layer.", "."): value for name, value in adapter.modules.items()}
    shapes = {path: these[0][0].weight_shape for path, these in parts.items()}
    shapes |= {path: value.shape for path, value in whole.items()}
    names = resolve(list(shapes), checkpoint)
    for path, name in names.items():
        _check_entry(name, checkpoint.entries[name], shapes[path])
        _check_untied(name, checkpoint)
    factors = lru_cache(maxsize=1)(_factors)  # tensors of a layer follow each other
    changes: dict[str, Change] = {}
    for path, these in parts.items():
        changes[names[path]] = partial(_sum, these, factors, partial(check, path) if check else None)
    return changes | {names[path]: partial(_encode, value) for path, value in whole.items()}


def resolve(paths: Sequence[str], checkpoint: Checkpoint) -> dict[str, str]:
    """Path in the adapted model to name in the checkpoint, by one prefix added to all or taken from all."""
    names = checkpoint.entries
    if all(path in names for path in paths):
        return {path: path for path in paths}
    steps = [i + 1 for i, letter in enumerate(paths[0]) if letter == "."][:-1]
    found = [{path: path.removeprefix(paths[0][:step]) for path in paths} for step in steps]
    found += [{path: name + path for path in paths} for name in _prefixes(names, paths[0])]
    fitting = [names_of for names_of in found if len(set(names_of.values()) & names.keys()) == len(paths)]
    if len(fitting) == 1:
        return fitting[0]
    absent = [path for path in paths if path not in names]
    raise HoraError(
        f"a checkpoint holds the weights that an adapter changes, under one prefix at most, got {len(fitting)} that "
        f"fit and no {absent[0]} among {len(names)} tensors such as {min(names, default='none')}: the weight is tied "
        "to another one, quantised, or of another model (spec F5)"
    )


def _prefixes(names: Iterable[str], path: str) -> set[str]:
    return {name.removesuffix(path) for name in names if name.endswith(f".{path}")}


def _check_full_precision(checkpoint: Checkpoint) -> None:
    if method := checkpoint.config.get("quantization_config"):
        name = method.get("quant_method", "quantised") if isinstance(method, dict) else method
        raise HoraError(
            f"an adapter is merged into weights of 16 bits or more, got a {name} checkpoint: merge into the one it was "
            "made from and quantise the result, or serve the adapter as LoRA (spec M1)"
        )


def _check_bare(checkpoint: Checkpoint) -> None:
    """Raise where `transformers` would load an adapter on top of the weights, from the base and from its copy."""
    if (checkpoint.directory / CONFIG).exists():
        raise HoraError(
            f"a base is a model without an adapter in its directory, got {CONFIG} in {str(checkpoint.directory)!r}: "
            "move the adapter elsewhere (spec M4)"
        )


def _check_entry(name: str, entry: Entry, shape: tuple[int, ...]) -> None:
    if entry.dtype not in _FLOATS:
        raise HoraError(
            f"an adapter is merged into weights of 16 bits or more, got {entry.dtype} for {name}: merge into the "
            "checkpoint in its full dtype, or serve the adapter as LoRA (spec M1)"
        )
    if entry.shape != tuple(shape):
        raise HoraError(
            f"{name} has shape {tuple(shape)} in the adapter, got {entry.shape} in the checkpoint: they are of "
            "different models (spec F5)"
        )


def _check_untied(name: str, checkpoint: Checkpoint) -> None:
    """Raise if another weight of the model would change along: an embedding is often the output head, too."""
    if _tied(checkpoint) and checkpoint.entries[name].shape[0] == _text(checkpoint.config).get("vocab_size"):
        raise HoraError(
            f"a merge changes the weights that were adapted alone, {name} is tied to another one: untie them in the "
            "base, or serve the adapter unmerged (spec M3)"
        )


def _tied(checkpoint: Checkpoint) -> bool:
    """Whether embedding and output head are one weight: by the config, or because one of them is not stored."""
    config = _text(checkpoint.config)
    stored = [entry.shape[0] for entry in checkpoint.entries.values() if len(entry.shape) == 2]
    return bool(config.get("tie_word_embeddings", stored.count(config.get("vocab_size", -1)) < 2))


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a model's config that speaks of its vocabulary."""
    return {**config, **(config.get("text_config") or {})}


_Part = tuple[Site, AdapterLayer, str]
"""Where a projection sits, its layer, and its name in that."""

_FactorsOf = Callable[[AdapterLayer], dict[str, reference.Factors]]


def _factors(layer: AdapterLayer) -> dict[str, reference.Factors]:
    return reference.factors(layer.spec, layer.shape, layer.params)


def _sum(
    parts: Sequence[_Part],
    factors: _FactorsOf,
    check: Callable[[NDArray[Any]], None] | None,
    entry: Entry,
) -> bytes:
    """Bytes of a base tensor with the deltas of its projections added, each in its window."""
    total = read_floats(entry)
    if check is not None:
        check(total)
    for site, layer, p in parts:
        a, b = factors(layer)[p]
        delta = np.empty((b.shape[0] * b.shape[1], a.shape[-1]), total.dtype)
        for i, (b_i, rows) in enumerate(zip(b, np.split(delta, len(b)), strict=True)):
            rows[:] = layer.spec.scaling * (b_i @ (a if a.ndim == 2 else a[i]))
        total[site.layout.index(total.shape)] += site.layout.write(delta, total.shape)
    return _encode(total, entry)


def read_floats(entry: Entry) -> NDArray[Any]:
    """A tensor of a checkpoint in the dtype of sums: float32, or float64 where it has that."""
    if entry.dtype not in _FLOATS:
        raise HoraError(f"a weight in full precision is floating, {entry.file} has one of {entry.dtype} (spec M1)")
    array = np.frombuffer(read_tensor(entry), _FLOATS[entry.dtype]).reshape(entry.shape)
    if entry.dtype == "BF16":
        wide = array.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return array.copy() if entry.dtype == "F64" else array.astype(np.float32)


def _encode(value: NDArray[Any], entry: Entry) -> bytes:
    """A tensor rounded once, to nearest even, to the dtype of its place."""
    with np.errstate(over="ignore"):
        if entry.dtype == "BF16":
            wide = np.ascontiguousarray(value, np.float32).view(np.uint32).ravel()
            array = np.empty(wide.shape, "<u2")
            for start in range(0, wide.size, _BLOCK):
                part = wide[start : start + _BLOCK]
                array[start : start + _BLOCK] = (part + (0x7FFF + ((part >> 16) & 1))) >> 16
            finite = np.isfinite(value).all() and ((array & 0x7F80) != 0x7F80).all()
        else:
            array = np.ascontiguousarray(value, _FLOATS[entry.dtype])
            finite = np.isfinite(array).all()
    if not finite:
        raise HoraError(
            f"a merged weight is finite, one of {entry.file.name} leaves the range of {entry.dtype}, or the base is "
            "not finite: merge into a wider dtype (spec M3)"
        )
    return array.tobytes()
