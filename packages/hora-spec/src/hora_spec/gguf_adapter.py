"""Adapters as GGUF files for llama.cpp, laid out for the GGUF file of the base (spec F9)."""

import os
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hora_spec.adapter import Adapter
from hora_spec.checkpoint import open_checkpoint
from hora_spec.errors import HoraError
from hora_spec.lora import LoraModule, portable, to_lora
from hora_spec.lora_files import rounded
from hora_spec.merged import read_floats, resolve
from hora_spec.servers import check_server
from hora_spec.staging import new_file

_ROTARY = {"llama": {"attn_q": "head_count", "attn_k": "head_count_kv"}}
"""Tensors whose rows llama.cpp reorders, to let the halves of a rotary head alternate, and where it counts heads."""

ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "gpt2")
"""Architectures of GGUF on which llama.cpp was found to compute what the adapter does; others are refused."""

_ALIKE = 0.8
"""Least cosine between a weight and the same weight after quantisation; rows in another order have about 0."""


def export_gguf(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    dtype: DTypeLike = np.float32,
) -> list[str]:
    """Write an adapter as a GGUF LoRA adapter for one base file, as ``--lora`` of llama.cpp takes it (spec F9).

    Parameters
    ----------
    adapter
        The adapter.
    path
        A new file; it appears when all is written.
    base
        The GGUF file, of whatever quantisation, to which the adapter will be applied: it says the architecture, the
        names and shapes of the tensors, and the heads by which rows were reordered.
    weights
        Directory of the base model as it was trained on. If given, the adapted weights of the GGUF file are compared
        with those, which proves their rows to lie as assumed, and the file to be of the same model.
    dtype
        Float16 or float32.

    Returns
    -------
    list of str
        Names of the adapted tensors in the GGUF file.

    Raises
    ------
    HoraError
        If the base is of an architecture that was not tested, or has other tensors, shapes, heads or weights; if
        llama.cpp takes no such adapter; if `dtype` cannot hold a factor; or if the disk is full. Nothing has been
        written then.

    Notes
    -----
    Needs the package gguf: ``pip install "hora-spec[gguf]"``.
    """
    gguf = _gguf()
    modules = portable(to_lora(adapter))
    check_server("llama.cpp", modules, adapter.modules, adapter.config)
    if np.dtype(dtype) not in (np.float16, np.float32):
        raise HoraError(f"a GGUF adapter is float16 or float32, got {np.dtype(dtype)} (spec F9)")
    file = _read_base(gguf, Path(base))
    heads = _heads(adapter)
    found = _names(gguf, file.arch, int(file.fields.get(f"{file.arch}.block_count", 0)), modules)
    names = {module: _check_present(file, module, name) for module, name in found.items()}
    if len(set(names.values())) < len(names):
        raise HoraError(f"each tensor of {file.path} is adapted once, got {sorted(names.values())} (spec F9)")
    tensors = {}
    for module, name in names.items():
        order = _order(file, name, heads[module], len(modules[module].b))
        _check_shape(file, name, module, modules[module])
        tensors[f"{name}.lora_a"] = rounded(module, modules[module].a, dtype)
        tensors[f"{name}.lora_b"] = rounded(module, modules[module].b[order], dtype)
    if weights is not None:
        _check_weights(gguf, file, Path(weights), modules, names, heads)
    with new_file(Path(path)) as target:
        _write(gguf, target, file.arch, next(iter(modules.values())).alpha, tensors)
        _check_written(gguf, target, tensors)
    return list(names.values())


def read_gguf(path: str | os.PathLike[str], adapter: Adapter) -> tuple[dict[str, NDArray[np.float64]], float]:
    """The updates that a GGUF adapter makes, (out, in) in the order of the model's rows, as llama.cpp scales them.

    Parameters
    ----------
    path
        A GGUF adapter.
    adapter
        Says which modules there may be and how many heads they have.

    Returns
    -------
    updates
        Module to float64 array; a tensor of no module of the adapter goes by its own name.
    eps
        Precision of the numbers.
    """
    gguf = _gguf()
    arch, fields, tensors = _open(gguf, Path(path))
    if (kind := fields.get("general.type"), fields.get("adapter.type")) != ("adapter", "lora"):
        raise HoraError(f"a GGUF adapter is of the types adapter and lora, got {kind} in {str(path)!r} (spec F9)")
    stored = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    blocks = 1 + max((int(name.split(".")[1]) for name in stored if name.startswith("blk.")), default=0)
    heads, updates = _heads(adapter), {}
    modules = {name: module for module, name in _names(gguf, arch, blocks, heads).items()}
    for name in stored:
        a, b = (np.asarray(tensors[f"{name}.lora_{factor}"].data, np.float64) for factor in "ab")
        if (module := modules.get(name)) is not None and _rotary(arch, name):
            b = b[np.argsort(_alternating(heads[module], len(b)))]
        updates[module or name] = fields["adapter.lora.alpha"] / len(a) * b @ a
    return updates, max(float(np.finfo(tensor.data.dtype).eps) for tensor in tensors.values())


def _heads(adapter: Adapter) -> dict[str, int]:
    return {site.module: site.projection.num_heads for la in adapter.layers.values() for site in la.sites.values()}


@dataclass(frozen=True, slots=True)
class _Base:
    """What a GGUF file says about itself."""

    path: Path
    arch: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, Any]

    def count(self, key: str, name: str) -> int:
        """A number of the architecture, for the block of a tensor where blocks differ."""
        if (value := self.fields.get(f"{self.arch}.{key}")) is None:
            raise HoraError(f"{self.path} states {self.arch}.{key}, which is absent: convert the base anew (spec F9)")
        return int(value[int(name.split(".")[1])] if isinstance(value, list) else value)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise HoraError('GGUF files need the package gguf: pip install "hora-spec[gguf]" (spec F9)') from error
    return gguf


def _open(gguf: Any, path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Architecture, fields but those of the tokenizer, and tensors of a GGUF file."""
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer")}
    except OSError as error:
        raise HoraError(f"a GGUF file can be read, got {error}: check the path (spec F9)") from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise HoraError(f"{str(path)!r} must be a whole GGUF file, got none, or damage: {error} (spec F9)") from error
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise HoraError(
            f"GGUF is written for the architectures {', '.join(ARCHITECTURES)}, on which llama.cpp was tested, got "
            f"{arch!r}: merge the adapter and convert the model instead (spec F9)"
        )
    return arch, fields, {tensor.name: tensor for tensor in reader.tensors}


def _read_base(gguf: Any, path: Path) -> _Base:
    arch, fields, tensors = _open(gguf, path)
    if fields.get("general.type", "model") != "model":
        raise HoraError(f"the base is a model, got the {fields['general.type']} {str(path)!r} (spec F9)")
    if fields.get("split.count", 1) > 1:
        raise HoraError(
            f"the base is one file, got one of {fields['split.count']}: join them, llama-gguf-split --merge (spec F9)"
        )
    return _Base(path, arch, fields, tensors)


def _names(gguf: Any, arch: str, blocks: int, modules: Iterable[str]) -> dict[str, str | None]:
    """Names of the weights of modules in a GGUF file."""
    table = gguf.get_tensor_name_map({name: member for member, name in gguf.MODEL_ARCH_NAMES.items()}[arch], blocks)
    return {module: table.get_name(f"{module}.weight", try_suffixes=(".weight",)) for module in modules}


def _check_present(file: _Base, module: str, name: str | None) -> str:
    if name is None or name not in file.tensors:
        raise HoraError(
            f"{file.path} has the weight of every adapted module, got none for {module} ({name or 'no name known'}): "
            "the adapter is of another model, or the weight is tied to another one (spec F9)"
        )
    return name


def _order(file: _Base, name: str, heads: int, rows: int) -> NDArray[np.intp]:
    """Which row of the model lies at each row of the GGUF tensor."""
    if (key := _rotary(file.arch, name)) is None:
        return np.arange(rows)
    if (count := file.count(f"attention.{key}", name)) != heads or rows % (2 * heads):
        raise HoraError(
            f"rows of {name} are reordered head by head, got {heads} heads in the adapter and {count} in {file.path}, "
            f"for {rows} rows: they are of different models (spec F9)"
        )
    return _alternating(heads, rows)


def _rotary(arch: str, name: str) -> str | None:
    """Where heads are counted, of a tensor whose rows are reordered."""
    return _ROTARY.get(arch, {}).get(name.split(".")[-2])


def _alternating(heads: int, rows: int) -> NDArray[np.intp]:
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def _check_shape(file: _Base, name: str, module: str, factors: LoraModule) -> None:
    stored, adapted = tuple(int(n) for n in file.tensors[name].shape[::-1]), (len(factors.b), factors.a.shape[1])
    if stored != adapted:
        raise HoraError(
            f"{name} has shape {stored} in {file.path}, got {adapted} for {module} in the adapter: they are of "
            "different models (spec F9)"
        )


def _check_weights(
    gguf: Any,
    file: _Base,
    directory: Path,
    modules: Mapping[str, LoraModule],
    names: Mapping[str, str],
    heads: Mapping[str, int],
) -> None:
    """Raise unless every adapted weight of the file is that of a checkpoint, in the order in which b was written."""
    checkpoint = open_checkpoint(directory)
    entries = resolve([f"{module}.{factors.parameter}" for module, factors in modules.items()], checkpoint)
    for (module, factors), entry in zip(modules.items(), entries.values(), strict=True):
        name, tensor = names[module], file.tensors[names[module]]
        weight = read_floats(checkpoint.entries[entry])
        weight = weight.T if factors.fan_in_fan_out else weight
        try:
            stored = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        except NotImplementedError as error:
            raise HoraError(
                f"{name} is compared once expanded, which failed: {error}; omit weights (spec F9)"
            ) from error
        order = _order(file, name, heads[module], len(weight))
        like = _cosine(weight[order], stored) if weight.shape == stored.shape else 0.0
        if like < _ALIKE:
            raise HoraError(
                f"{name} in {file.path} is {entry} in {str(directory)!r}, got a cosine of {like:.2f} between them: the "
                "file is of another model, or was converted in another order of rows (spec F9)"
            )


def _cosine(one: NDArray[Any], other: NDArray[Any]) -> float:
    return float(np.vdot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other) or 1.0))


def _write(gguf: Any, target: Path, arch: str, alpha: float, tensors: Mapping[str, NDArray[Any]]) -> None:
    with closing(gguf.GGUFWriter(target, arch)) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, value in tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(value))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _check_written(gguf: Any, target: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Raise unless a file holds what was written: gguf 0.19 writes by `tofile`, which is silent on a full disk."""
    try:
        _, _, stored = _open(gguf, target)
    except HoraError as error:
        raise _incomplete(target) from error
    if any(np.asarray(stored[name].data).tobytes() != value.tobytes() for name, value in tensors.items()):
        raise _incomplete(target)


def _incomplete(target: Path) -> HoraError:
    return HoraError(
        f"a file holds all that was written, {target.name!r} does not: the disk is full, or a quota reached; free "
        "space and export again (spec F3)"
    )
