"""Why PEFT cannot be imported, where the reason is another package."""

from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version


@contextmanager
def explained() -> Generator[None]:
    """Imports within say what to do where torchvision was built for another torch than the one that is installed.

    PEFT and Transformers import torchvision where they find it. Where its compiled operators do not load, as beside a
    CPU build of torch, they fail with a message that names one of their own classes.

    Raises
    ------
    ImportError
        With the versions that do not fit, and the cure.
    """
    try:
        yield
    except Exception as error:
        reason = _about_torchvision(error)
        if reason is None:
            raise
        raise ImportError(
            "PEFT imports torchvision where it is installed, and it must be built for the torch beside it, got "
            f"torchvision {_version('torchvision')} beside torch {_version('torch')} ({reason}): install both in "
            "one command, `pip install --force-reinstall torch torchvision`, from where your torch came from, or "
            "`pip uninstall torchvision` where nothing needs it"
        ) from error


def _about_torchvision(error: BaseException | None) -> str | None:
    """What torchvision said, anywhere among the causes."""
    while error is not None:
        # the second: of a module that failed before in this process
        if "torchvision::" in str(error) or "partially initialized module 'torchvision'" in str(error):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of unknown version"
