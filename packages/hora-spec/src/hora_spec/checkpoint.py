"""Checkpoints of models as safetensors files, read and rewritten tensor by tensor."""

import json
import operator
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hora_spec.errors import HoraError
from hora_spec.tensors import damaged, data_length, header_length

_STEMS = ("model", "diffusion_pytorch_model")
"""What `transformers` and `diffusers` call the weights."""

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a safetensors file: where its bytes are, and what they mean in the words of safetensors."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model directory with its weights as safetensors.

    Parameters
    ----------
    directory
        As `transformers` saves it.
    config
        Content of ``config.json``.
    entries
        Tensor name to place, of all shards.
    index
        The file that says which shard holds which tensor, if there are several.
    """

    directory: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    index: Path | None = None

    @property
    def shards(self) -> list[Path]:
        """Files that hold tensors, in order of their names."""
        return sorted({entry.file for entry in self.entries.values()})

    @property
    def others(self) -> list[Path]:
        """Files beside the weights that belong to the model: configs, the tokenizer, code, the index of the shards."""
        files = [path for path in self.directory.iterdir() if path.is_file() and not _is_weights(path)]
        return sorted([*files, self.index] if self.index else files)


def open_checkpoint(directory: Path) -> Checkpoint:
    """What the files of a model directory say about its tensors, none of which is read.

    Raises
    ------
    HoraError
        If there are no safetensors, a file is damaged, or the index names other tensors than the files hold.
    """
    if not directory.is_dir():
        raise HoraError(f"a checkpoint is a directory, got {str(directory)!r}, which is none: check the path (spec M4)")
    config = _json(directory / "config.json") if (directory / "config.json").exists() else {}
    for stem in _STEMS:
        if (single := directory / f"{stem}.safetensors").exists():
            return Checkpoint(directory, config, _entries(single))
        if (index := directory / f"{stem}.safetensors.index.json").exists():
            return Checkpoint(directory, config, _sharded(index), index)
    raise HoraError(
        f"a checkpoint has {_STEMS[0]}.safetensors, or shards and {_STEMS[0]}.safetensors.index.json, got neither in "
        f"{str(directory)!r}: {_advice(directory)} (spec M4)"
    )


def _advice(directory: Path) -> str:
    """What to do where there is no model: pipelines, and caches of a hub, hold models in folders."""
    patterns = [f"{depth}/{stem}*.safetensors" for depth in ("*", "*/*") for stem in _STEMS]
    found = {path.parent.relative_to(directory) for pattern in patterns for path in directory.glob(pattern)}
    if places := sorted(map(str, found)):
        return f"there are models in its folders {', '.join(places[:3])}, name one of them"
    return "save the model with save_pretrained, as safetensors"


def read_tensor(entry: Entry) -> bytearray:
    """The bytes of one tensor, row-major and little-endian."""
    data = bytearray(entry.stop - entry.start)
    with open(entry.file, "rb") as file:
        file.seek(entry.start)
        if file.readinto(data) != len(data):
            raise damaged(entry.file, "it became shorter")
    return data


def rewrite(
    checkpoint: Checkpoint,
    out: Path,
    changes: Mapping[str, Callable[[Entry], bytes | bytearray]],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a checkpoint into the directory `out` with some tensors changed, one tensor in memory at a time.

    Parameters
    ----------
    checkpoint
        The source. Its headers, its shards and all files beside the weights stay what they are.
    out
        An empty directory.
    changes
        Tensor name to a function that returns its new bytes, of the same dtype and shape.
    progress
        Called with the bytes written and their total.
    """
    total, done = sum(path.stat().st_size for path in checkpoint.shards), 0
    for path in checkpoint.others:
        shutil.copyfile(path, out / path.name)
    for path in checkpoint.shards:
        with open(path, "rb") as source, open(out / path.name, "xb") as target:
            for size in _rewritten(checkpoint, path, source, target, changes):
                done += size
                if progress is not None:
                    progress(done, total)


def _rewritten(
    checkpoint: Checkpoint,
    path: Path,
    source: BinaryIO,
    target: BinaryIO,
    changes: Mapping[str, Callable[[Entry], bytes | bytearray]],
) -> Iterator[int]:
    """Copy one shard, changed where it must be; sizes of what was written."""
    changed = {name: entry for name, entry in checkpoint.entries.items() if entry.file == path and name in changes}
    for name, entry in sorted(changed.items(), key=lambda item: item[1].start):
        yield from _copied(source, target, entry.start - source.tell())
        data = changes[name](entry)
        if len(data) != entry.stop - entry.start:
            raise ValueError(f"{name} has {entry.stop - entry.start} bytes, got {len(data)}")
        target.write(data)
        source.seek(entry.stop)
        yield len(data)
    yield from _copied(source, target, path.stat().st_size - source.tell())


def _copied(source: BinaryIO, target: BinaryIO, size: int) -> Iterator[int]:
    while size:
        data = source.read(min(size, _CHUNK))
        if not data:
            raise damaged(Path(source.name), "it became shorter")
        target.write(data)
        size -= len(data)
        yield len(data)


def _sharded(index: Path) -> dict[str, Entry]:
    """Tensors of all files that an index names."""
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise HoraError(f"{index} maps tensors to files, got another content: download it again (spec M4)")
    entries: dict[str, Entry] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise HoraError(f"{index} names files beside it, got {name!r} (spec M4)")
        entries |= _entries(index.parent / name)
    if odd := sorted(entries.keys() ^ places.keys()):
        raise HoraError(
            f"{index} names the tensors of its files, got a difference in {odd[0]}: download it again (spec M4)"
        )
    return entries


def _entries(path: Path) -> dict[str, Entry]:
    """Tensors of a file, whose header is true."""
    if not path.is_file():
        raise HoraError(f"a checkpoint has all of its files, {str(path)!r} is absent: download it again (spec M4)")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = header_length(file.read(8), path)
        header = file.read(min(length, size))
    if size != 8 + length + data_length(header, path):
        raise damaged(path, f"it has {size} bytes, its header announces another number")
    return {
        name: _entry(path, name, entry, 8 + length)
        for name, entry in json.loads(header).items()
        if name != "__metadata__"
    }


def _entry(path: Path, name: str, entry: Any, offset: int) -> Entry:
    try:
        shape = tuple(map(operator.index, entry["shape"]))
        start, stop = (offset + operator.index(value) for value in entry["data_offsets"])
        return Entry(path, str(entry["dtype"]), shape, start, stop)
    except (TypeError, LookupError, ValueError) as error:
        raise damaged(path, f"its header describes {name} in no known way") from error


def _is_weights(path: Path) -> bool:
    """Whether a file holds weights in whatever form, or is the index of such files."""
    return path.suffix in _WEIGHTS or path.name.endswith(".index.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise HoraError(f"{path} must be JSON: {error}; it is damaged, download it again (spec M4)") from error
    if not isinstance(content, dict):
        raise HoraError(f"{path} must be a JSON object, got a {type(content).__name__} (spec M4)")
    return content
