"""Where downloads and results go, and files that are whole or absent."""

import errno
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile, mkdtemp
from typing import Any, Final

from filelock import FileLock
from hora_spec import HoraError
from platformdirs import user_cache_path

NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_dir() -> Path:
    """The cache: ``HORA_BENCH_CACHE`` if set, else the platform's cache directory."""
    return Path(os.environ.get("HORA_BENCH_CACHE") or user_cache_path("hora-bench"))


@contextmanager
def one_at_a_time(path: Path) -> Generator[None]:
    """Other processes that are about to make `path` wait; what killed ones left of it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.parent / f".lock.{path.name}"
    with FileLock(lock):
        remove_leftovers(path)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # who waits notices, and waits for a new one


@contextmanager
def needs_room(path: Path) -> Generator[None]:
    """Raise HoraError where `path` cannot be written for want of space."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise HoraError(
            f"{path} needs room on its disk, got {os.strerror(error.errno).lower()!r}: free some and run again, "
            "finished work is kept"
        ) from error


@contextmanager
def new_file(path: Path) -> Generator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error."""
    with needs_room(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
        try:
            yield temporary
            _sync(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path) -> Generator[Path]:
    """A temporary directory beside `path` that takes its place when the block ends without an error."""
    with needs_room(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            temporary.chmod(0o755)
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers of `path` left beside it; call it when nobody writes there any more."""
    for left in path.parent.iterdir():
        if left.name.startswith(f".{path.name}."):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, keys in the order given."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises
    ------
    HoraError
        It is torn or no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise HoraError(f"{path} must hold JSON, got {error}: remove it or restore it") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
