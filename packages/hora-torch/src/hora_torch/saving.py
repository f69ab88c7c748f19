"""What ties PEFT's two files together: digests, written after the tensors and checked before they are used (spec F7).

PEFT writes tensors and config in place, one after the other, and reads the config long before the tensors. So the pair
is checked when the config is read, while the model is untouched, and the tensors once more when they are loaded.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from hora_spec import HoraError
from hora_spec.directory import CONFIG, TENSORS, read_pair
from hora_spec.files import PREFIX, adapter_of, check_digests, torn_pair
from hora_spec.tensors import Stored, decode, tensors_digest
from peft.utils.constants import WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}


class Digested(Protocol):
    """A config that knows the digest of the tensors that belong to it."""

    hora_tensors_sha256: str | None


def read_checked(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The config at a path, if tensors lie beside it and the two are a pair; None if there are none.

    Raises
    ------
    HoraError
        If the pair is torn, or one of the files is damaged, no regular file or unreadable (spec F5, F7).
    """
    file = Path(path)
    if file.name != CONFIG or not os.path.lexists(file.parent / TENSORS):
        return None
    config, tensors = read_pair(file.parent)
    check_digests(config, tensors)
    return config


def check_directory(directory: str | os.PathLike[str]) -> None:
    """Raise unless a directory with the config of an adapter holds the whole adapter, before anything is injected.

    A config that describes no layers belongs to no adapter yet; pickled tensors are PEFT's to check.

    Raises
    ------
    HoraError
        As `hora_spec.load_adapter`; parameters may be of any floating dtype.
    """
    folder = Path(directory)
    if os.path.lexists(folder / TENSORS):
        config, stored = read_pair(folder)
        if config.get("hora_layers") is not None:
            adapter_of(config, stored, any_float=True)
    elif _describes_layers(folder / CONFIG) and not (folder / WEIGHTS_NAME).is_file():
        raise HoraError(
            f"an adapter directory holds {CONFIG} and {TENSORS}, {str(folder)!r} lacks the tensors: save the adapter "
            "again, or set hora_layers to null in a config that is meant for new adapters (spec F1)"
        )


def _describes_layers(file: Path) -> bool:
    return file.is_file() and b'"hora_layers": [' in file.read_bytes()


def written_digest(directory: str | os.PathLike[str]) -> str | None:
    """Digest of the tensors that PEFT wrote last into a directory; None if there are none, or others are at it.

    PEFT leaves a safetensors file where it is when it pickles, and reads it rather than the newer pickled one: the
    digest of the newer file shows that.
    """
    files = [path for path in (Path(directory, TENSORS), Path(directory, WEIGHTS_NAME)) if path.is_file()]
    if not files:
        return None
    newest = max(files, key=lambda path: path.stat().st_mtime_ns)
    if newest.name == WEIGHTS_NAME:
        return tensors_digest(_stored(torch.load(newest, map_location="cpu", weights_only=True)))
    try:
        return tensors_digest(decode(newest.read_bytes(), newest))
    except HoraError:  # another process is writing the same directory
        return None


def check_loaded(model: nn.Module, config: Digested, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Raise unless the tensors of a checkpoint are numbers, and those that the config was written with.

    The config forgets its digest: what is loaded later, such as a checkpoint of further training, is another's.

    Raises
    ------
    HoraError
        If a parameter is not of a floating dtype, a tensor of a whole module is NaN, or the digest is that of other
        tensors (spec F5, F7).
    """
    for key, tensor in state_dict.items():
        if ".hora_hyper." in key and tensor.dtype not in _FLOATING:
            raise HoraError(f"{key} must be floating, got {tensor.dtype}: save the adapter again (spec F5)")
        if tensor.dtype in _FLOATING and not tensor.is_meta and torch.isnan(tensor).any():
            raise HoraError(f"{key} must be finite, got NaN: training diverged (spec F5)")
    if config.hora_tensors_sha256 is not None and not any(tensor.is_meta for tensor in state_dict.values()):
        given = _file_names(model, adapter_name)
        named = {given.get(key, key): tensor for key, tensor in state_dict.items()}
        if config.hora_tensors_sha256 != tensors_digest(_stored(named)):
            raise torn_pair()
    config.hora_tensors_sha256 = None


def _file_names(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Keys under which PEFT looks for the tensors of whole modules, and their names in the file."""
    names = {}
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            own = path.removeprefix("_fsdp_wrapped_module.")
            for saved, loaded in module.adapter_state_dict_load_map(adapter_name).items():
                names[f"{own}.{loaded}"] = f"{own}.{saved}"
    return names


def _stored(tensors: Mapping[str, Tensor]) -> Iterator[Stored]:
    """Tensors as a file holds them; PEFT's prefix is added where a model without PEFT's wrapper has dropped it."""
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype))
        yield Stored(PREFIX + name.removeprefix(PREFIX), dtype, tuple(tensor.shape), flat.numpy().data)
