"""Tensors as the bytes of a safetensors file, and their digest (spec F1, F7)."""

import hashlib
import json
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from hora_spec.errors import HoraError

_METADATA = {"format": "pt"}  # one key at most: safetensors writes several in random order
_HEADER_LIMIT = 100_000_000  # that of safetensors
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


class Stored(NamedTuple):
    """A tensor as a file holds it: `dtype` in the words of safetensors, `data` row-major and little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def tensors_digest(tensors: Iterable[Stored]) -> str:
    """SHA-256 of names, dtypes, shapes and values, whatever the order and the metadata of the file (spec F7)."""
    digest = hashlib.sha256()
    for name, dtype, shape, data in sorted(tensors, key=lambda tensor: tensor.name):
        digest.update(json.dumps([name, dtype, list(shape)], separators=(",", ":")).encode() + b"\n")
        digest.update(data)
    return digest.hexdigest()


def encode(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """Content of the tensor file; raises HoraError if a name or a dtype does not fit into one (spec F1)."""
    try:
        return save({name: np.asarray(array, order="C") for name, array in tensors.items()}, metadata=_METADATA)
    except (SafetensorError, TypeError, ValueError) as error:
        raise HoraError(f"tensors are arrays of numbers with names in Unicode: {error} (spec F1)") from error


def decode(data: bytes, path: Path) -> list[Stored]:
    """Tensors of a file's content, sorted by name; raises HoraError that names `path` (spec F5)."""
    try:
        entries = sorted(deserialize(data), key=lambda entry: entry[0])
    except SafetensorError as error:
        raise damaged(path, error) from error
    return [Stored(name, entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in entries]


def to_numpy(tensor: Stored) -> NDArray[Any]:
    """The tensor as an array; bfloat16, which NumPy lacks, comes as float32, which is exact (spec F1)."""
    if tensor.dtype not in _DTYPES:
        raise HoraError(
            f"tensors are of {', '.join(_DTYPES)}, got {tensor.dtype} for {tensor.name}: cast it and save it again "
            "(spec F5)"
        )
    array = np.frombuffer(tensor.data, _DTYPES[tensor.dtype])
    if tensor.dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.reshape(tensor.shape)


def header_length(start: bytes, path: Path) -> int:
    """Length of the header that follows the first eight bytes of a file (spec F5)."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > _HEADER_LIMIT:
        raise damaged(path, "its header has no length")
    return length


def data_length(header: bytes, path: Path) -> int:
    """How many bytes of tensors a header announces (spec F5)."""
    try:
        entries = json.loads(header)
        stops = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        return max(map(operator.index, stops), default=0)
    except (ValueError, RecursionError, AttributeError, TypeError, LookupError) as error:
        raise damaged(path, "its header is no table of tensors") from error


def damaged(path: Path, reason: object) -> HoraError:
    """The error for a tensor file that is not whole."""
    return HoraError(
        f"{path} must be a whole safetensors file: {reason}; it is truncated or damaged, copy or save it again "
        "(spec F5)"
    )
