"""Two files that are read and replaced as one: tensors and config of an adapter directory (spec F1, F3).

The config names nothing inside the tensor file, so that PEFT can write either; what keeps the pair together is the name
of the pending config, which carries a digest of the tensors it belongs to. Once the tensors are in place, the
adapter is the new one, whether or not the pending config has got its final name yet.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from hora_spec.errors import HoraError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

_METADATA = {"format": "pt"}  # one key at most: safetensors writes several in random order
_LEFTOVERS = (f"{TENSORS}.tmp", f"{CONFIG}.*.tmp")
_DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "BF16": "<u2",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}


def read_pair(directory: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Config and tensors of one moment.

    Parameters
    ----------
    directory
        An adapter directory.

    Returns
    -------
    config
        The JSON object of ``adapter_config.json``.
    tensors
        Name to array, sorted by name. NumPy knows no bfloat16: such tensors come as float32, which is exact.

    Raises
    ------
    HoraError
        If a file is absent, damaged or no adapter (spec F1, F5).
    """
    if not directory.is_dir():
        raise HoraError(f"an adapter is a directory, got {str(directory)!r}, which is none: check the path (spec F1)")
    try:
        text, data = _read_consistent(directory)
    except FileNotFoundError as error:
        raise HoraError(
            f"an adapter directory holds {CONFIG} and {TENSORS}, {str(directory)!r} lacks "
            f"{Path(error.filename).name}: save the adapter again, as safetensors (spec F1)"
        ) from error
    return _config(text, directory / CONFIG), _tensors(data, directory / TENSORS)


def write_pair(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> None:
    """Replace config and tensors of `directory` such that a crash leaves the old pair whole, or the new one (spec F3).

    One writer at a time. Raises HoraError if `config` is not JSON, or a tensor has a dtype that safetensors lacks.
    """
    try:
        text = json.dumps(config, indent=2, sort_keys=True).encode()
        data = save({name: np.asarray(array, order="C") for name, array in tensors.items()}, metadata=_METADATA)
    except (TypeError, ValueError) as error:
        raise HoraError(f"a config consists of JSON values: {error} (spec F1)") from error
    except SafetensorError as error:
        raise HoraError(f"tensors are arrays of numbers: {error} (spec F1)") from error
    directory.mkdir(parents=True, exist_ok=True)
    new_tensors, new_config = directory / f"{TENSORS}.tmp", directory / _pending(data)
    try:
        _write(new_tensors, data)
        _write(new_config, text)
        _sync(directory)
        os.replace(new_tensors, directory / TENSORS)
    except BaseException:
        with contextlib.suppress(OSError):
            if new_tensors.exists():  # else it is in place, and the new config belongs to it
                new_config.unlink(missing_ok=True)
                new_tensors.unlink()
        raise
    _sync(directory)
    os.replace(new_config, directory / CONFIG)
    _sync(directory)
    for leftover in leftovers(directory):
        leftover.unlink(missing_ok=True)


def leftovers(directory: Path) -> set[Path]:
    """Temporary files of a writer that was interrupted."""
    return {path for pattern in _LEFTOVERS for path in directory.glob(pattern)}


def check_target(directory: Path, peft_type: str | None = None) -> None:
    """Raise if writing into `directory` could destroy anything but an adapter of type `peft_type` (spec F3)."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise HoraError(f"an adapter is a directory, got the file {str(directory)!r}: choose another path (spec F3)")
    others = sorted(path.name for path in set(directory.iterdir()) - leftovers(directory))
    if others and (peft_type is None or peft_type not in _types(directory)):
        held = "something else than an earlier adapter" if peft_type else "something"
        raise HoraError(
            f"nothing is overwritten silently, {str(directory)!r} holds {held} ({', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}): choose an empty directory (spec F3)"
        )


def _types(directory: Path) -> set[Any]:
    """PEFT types of the configs in a directory, pending ones included."""
    types = set()
    for path in (directory / CONFIG, *directory.glob(_LEFTOVERS[1])):
        with contextlib.suppress(OSError, HoraError):
            types.add(str(_config(path.read_bytes(), path).get("peft_type")))
    return types


def _pending(data: bytes) -> str:
    return f"{CONFIG}.{hashlib.sha256(data).hexdigest()[:16]}.tmp"


def _read_consistent(directory: Path) -> tuple[bytes, bytes]:
    """Config and tensors; again if the tensors were replaced in between."""
    while True:
        before = os.stat(directory / TENSORS)
        data = (directory / TENSORS).read_bytes()
        try:
            text = (directory / _pending(data)).read_bytes()
        except FileNotFoundError:
            text = (directory / CONFIG).read_bytes()
        after = os.stat(directory / TENSORS)
        if (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns):
            return text, data


def _config(text: bytes, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HoraError(f"{path} must be JSON: {error}; it is damaged, save the adapter again (spec F5)") from error
    if not isinstance(config, dict):
        raise HoraError(f"{path} must be a JSON object, got a {type(config).__name__} (spec F5)")
    return config


def _tensors(data: bytes, path: Path) -> dict[str, NDArray[Any]]:
    try:
        entries = sorted(deserialize(data), key=lambda entry: entry[0])
    except SafetensorError as error:
        raise HoraError(
            f"{path} must be a whole safetensors file: {error}; it is truncated or damaged, copy or save it again "
            "(spec F5)"
        ) from error
    return {name: _array(name, entry, path) for name, entry in entries}


def _array(name: str, entry: Mapping[str, Any], path: Path) -> NDArray[Any]:
    dtype, data = entry["dtype"], entry["data"]
    if dtype not in _DTYPES:
        raise HoraError(f"tensors are of {', '.join(_DTYPES)}, got {dtype} for {name} in {path}: cast it (spec F5)")
    array = np.frombuffer(data, _DTYPES[dtype])
    if dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.reshape(entry["shape"])


def _write(path: Path, data: bytes) -> None:
    binary = getattr(os, "O_BINARY", 0)  # Windows translates line ends otherwise
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | binary, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(directory: Path) -> None:
    """Make renames durable, where directories can be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
