"""Directories and files that appear whole or not at all, whatever happens to the writer (spec F3)."""

import contextlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path

from hora_spec.errors import HoraError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def new_directory(target: Path) -> Generator[Path]:
    """A directory to fill, which becomes `target` when the block ends and vanishes when it raises.

    A writer that is killed leaves ``.NAME.partial`` beside the target, which the next one takes over.

    Raises
    ------
    HoraError
        If the target is there and not an empty directory, or another process is writing it.
    """
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise _taken(target)
    with _workspace(target) as workspace:
        yield workspace
        _sync_all(workspace)
        try:
            if target.exists():
                target.rmdir()  # an empty one, else an error; Windows renames to nothing that exists
            os.rename(workspace, target)
        except OSError as error:
            if target.exists():
                raise _taken(target) from error
            raise
        _sync(target.parent)


@contextlib.contextmanager
def new_file(target: Path) -> Generator[Path]:
    """A path to write to, whose file becomes `target` when the block ends and vanishes when it raises.

    Raises
    ------
    HoraError
        If the target is there, or another process is writing it.
    """
    if target.is_symlink() or target.exists():
        raise _taken(target)
    with _workspace(target) as workspace:
        yield workspace / target.name
        _sync_all(workspace)
        if target.exists():
            raise _taken(target)
        os.rename(workspace / target.name, target)
        _sync(target.parent)


@contextlib.contextmanager
def _workspace(target: Path) -> Generator[Path]:
    """An empty directory beside `target` that no other process uses; what is left of it is removed."""
    workspace = target.parent / f".{target.name}.partial"
    workspace.mkdir(parents=True, exist_ok=True)
    with _locked(workspace):
        for leftover in workspace.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        try:
            yield workspace
        finally:
            shutil.rmtree(workspace, ignore_errors=True)


@contextlib.contextmanager
def _locked(workspace: Path) -> Generator[None]:
    """Keep other writers out; the lock ends with the process. Some file systems, and Windows, have none."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(workspace, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _busy(workspace) from error
        except OSError:
            pass
        if not workspace.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(workspace)):
            raise _busy(workspace)  # it became the target, or was removed, before it was locked
        yield
    finally:
        os.close(descriptor)


def _taken(target: Path) -> HoraError:
    return HoraError(f"nothing is overwritten silently, {str(target)!r} is there: choose a new path (spec F3)")


def _busy(workspace: Path) -> HoraError:
    return HoraError(f"one process writes a path at a time, another one uses {str(workspace)!r}: wait for it (spec F3)")


def _sync_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    """Make content, or for a directory its names, durable."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
