"""Two files that are read and replaced as one: tensors and config of an adapter directory (spec F1, F3).

Files cannot be renamed two at a time. Between the two renames the new config waits under a name that carries a digest
of the tensor file it belongs to, and there a reader finds it. PEFT writes both files in place and knows no such name;
what shows a pair that PEFT tore are the digests inside the config (spec F7).
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from hora_spec.errors import HoraError
from hora_spec.tensors import Stored, damaged, data_length, decode, header_length

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

_CONFIG_LIMIT = 100_000_000
_TRIES = 100
_DIGITS = "[0-9a-f]" * 16
_PENDING = f"{CONFIG}.{_DIGITS}.tmp"
_LEFTOVERS = (_PENDING, f"{TENSORS}.{_DIGITS}.tmp", f"{TENSORS}.tmp")


def read_pair(directory: Path) -> tuple[dict[str, Any], list[Stored]]:
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
        Sorted by name.

    Raises
    ------
    HoraError
        If a file is absent, damaged, no regular file, or cannot be read (spec F1, F5).
    """
    try:
        if not stat.S_ISDIR(os.stat(directory).st_mode):
            raise NotADirectoryError
        text, data = _read_consistent(directory)
        return _config(text, directory / CONFIG), decode(data, directory / TENSORS)
    except HoraError:
        raise
    except FileNotFoundError as error:
        if not directory.is_dir():
            raise _no_directory(directory) from error
        raise HoraError(
            f"an adapter directory holds {CONFIG} and {TENSORS}, {str(directory)!r} lacks "
            f"{Path(error.filename).name}: {_advice(directory)} (spec F1)"
        ) from error
    except NotADirectoryError as error:
        raise _no_directory(directory) from error
    except MemoryError as error:
        raise HoraError(f"an adapter fits into memory, {str(directory)!r} does not: is it one? (spec F5)") from error
    except (OSError, ValueError) as error:
        raise HoraError(
            f"the files of an adapter can be read, got {error} in {str(directory)!r}: check path and permissions "
            "(spec F5)"
        ) from error


def write_pair(directory: Path, config: Mapping[str, Any], tensors: bytes, *, replace: bool) -> None:
    """Replace config and tensors of `directory` such that a crash leaves the old pair whole, or the new one (spec F3).

    Parameters
    ----------
    directory
        Made if absent; locked while it is written.
    config
        JSON values, ``peft_type`` among them.
    tensors
        Content of the tensor file.
    replace
        Whether an earlier adapter of the same ``peft_type`` may be replaced; an unfinished one always is.

    Raises
    ------
    HoraError
        If `config` is not JSON, or something else would be destroyed. Nothing has been written then.
    """
    try:
        text = json.dumps(config, indent=2, sort_keys=True).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise HoraError(f"a config consists of JSON values: {error} (spec F1)") from error
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise HoraError(
            f"an adapter is a directory, got the file {str(directory)!r}: choose another path (spec F3)"
        ) from error
    with _locked(directory):
        _check_target(directory, config["peft_type"], replace)
        _replace(directory, text, tensors)


def _replace(directory: Path, text: bytes, data: bytes) -> None:
    new_tensors, new_config = directory / f"{TENSORS}.{_digits(data)}.tmp", directory / _pending(data)
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
    for leftover in _leftovers(directory):
        leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Generator[None]:
    """Keep other writers out; the lock ends with the process. Some file systems, and Windows, have none."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child would hold it as long as it lives
        os.close(descriptor)


def _leftovers(directory: Path) -> set[Path]:
    """Temporary files of a writer that was interrupted."""
    return {path for pattern in _LEFTOVERS for path in directory.glob(pattern)}


def _check_target(directory: Path, peft_type: str, replace: bool) -> None:
    """Raise if writing could destroy anything but an adapter of type `peft_type` (spec F3)."""
    others = sorted(path.name for path in set(directory.iterdir()) - _leftovers(directory))
    if not others or (replace and peft_type in _types(directory)):
        return
    if others == [TENSORS] and _unfinished(directory) == peft_type:
        return
    held = "something else than an earlier adapter" if replace else "something"
    raise HoraError(
        f"nothing is overwritten silently, {str(directory)!r} holds {held} ({', '.join(others[:3])}"
        f"{', ...' if len(others) > 3 else ''}): choose an empty directory (spec F3)"
    )


def _types(directory: Path) -> set[str | None]:
    """PEFT types of the configs in a directory, pending ones included."""
    return {_type(path) for path in (directory / CONFIG, *directory.glob(_PENDING))}


def _unfinished(directory: Path) -> str | None:
    """PEFT type of the pending config that belongs to the tensors in place."""
    with contextlib.suppress(HoraError):
        return _type(directory / _pending(_read_tensors(directory / TENSORS)))
    return None


def _type(path: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError, HoraError):
        return str(_config(_read_config(path), path).get("peft_type"))
    return None


def _pending(data: bytes) -> str:
    return f"{CONFIG}.{_digits(data)}.tmp"


def _digits(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _read_consistent(directory: Path) -> tuple[bytes, bytes]:
    """Config and tensors; again if the tensors were replaced in between."""
    for _ in range(_TRIES):
        before = os.stat(directory / TENSORS)
        data = _read_tensors(directory / TENSORS)
        try:
            text = _read_config(directory / _pending(data))
        except FileNotFoundError:
            text = _read_config(directory / CONFIG)
        after = os.stat(directory / TENSORS)
        if (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns):
            return text, data
    raise HoraError(f"an adapter is read while nobody writes it, {directory} keeps changing: try again later (spec F5)")


def _read_config(path: Path) -> bytes:
    with _open_regular(path) as file:
        text = file.read(_CONFIG_LIMIT + 1)
    if len(text) > _CONFIG_LIMIT:
        raise HoraError(f"{path} must be JSON of at most {_CONFIG_LIMIT} bytes, got more: it is none (spec F5)")
    return text


def _read_tensors(path: Path) -> bytes:
    """The whole file, once its header and its size agree."""
    with _open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = header_length(start, path)
        header = file.read(min(length, size))
        if size != 8 + length + data_length(header, path):
            raise damaged(path, f"it has {size} bytes, its header announces another number")
        return start + header + file.read()


@contextlib.contextmanager
def _open_regular(path: Path) -> Generator[BinaryIO]:
    """A file to read; never waits, as opening a FIFO would."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise HoraError(f"{path} must be a regular file, got none: save the adapter again (spec F5)")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def _config(text: bytes, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HoraError(f"{path} must be JSON: {error}; it is damaged, save the adapter again (spec F5)") from error
    if not isinstance(config, dict):
        raise HoraError(f"{path} must be a JSON object, got a {type(config).__name__} (spec F5)")
    return config


def _advice(directory: Path) -> str:
    """What to do where there is no adapter: PEFT saves one that has a name in a folder of that name."""
    places = sorted(str(path.parent.relative_to(directory)) for path in directory.glob(f"*/{CONFIG}"))
    if places:
        return f"there are adapters in its folders {', '.join(places[:3])}, name one of them"
    return "save the adapter again, as safetensors"


def _no_directory(path: Path) -> HoraError:
    return HoraError(f"an adapter is a directory, got {str(path)!r}, which is none: check the path (spec F1)")


_BINARY = getattr(os, "O_BINARY", 0)  # Windows translates line ends otherwise


def _write(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
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
