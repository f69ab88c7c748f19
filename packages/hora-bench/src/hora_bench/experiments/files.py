"""The experiment files that belong to this package, by name."""

from pathlib import Path
from typing import Final

import typer

SHIPPED: Final = next(
    folder
    # in a wheel, in a checkout
    for folder in (Path(__file__).with_name("files"), Path(__file__).parents[3] / "experiments")
    if folder.is_dir()
)
"""Folder of the files."""


def experiment_file(text: str) -> Path:
    """A file of the caller's, or else the shipped one of that name.

    Parameters
    ----------
    text
        A path, or a name such as ``control-digits`` or ``experiments/control-digits.toml``.

    Raises
    ------
    typer.BadParameter
        If neither is there; with the names that are.
    """
    path = Path(text)
    shipped = SHIPPED / f"{path.name.removesuffix('.toml')}.toml"
    if path.is_file():
        return path
    if path.parent in (Path(), Path("experiments")) and shipped.is_file():
        return shipped
    names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.toml")))
    raise typer.BadParameter(f"an experiment is a file or one of {names}, got {text}")
