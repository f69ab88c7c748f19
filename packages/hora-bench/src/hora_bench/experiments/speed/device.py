"""Where measurements run: on the device that was asked for, never on another one silently."""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager
from typing import Literal

from hora_spec import HoraError

Device = Literal["cpu", "cuda"]


@contextmanager
def on_device(device: Device, backends: Collection[str]) -> Generator[str]:
    """Models that are built inside are on a device; gives its name.

    Parameters
    ----------
    device
        ``"cpu"`` or ``"cuda"``, of which the first GPU is taken.
    backends
        Those that will be used, ``"torch"`` or ``"jax"``.

    Raises
    ------
    HoraError
        One of them has no such device.
    """
    import jax
    import torch
    from accelerate.utils import patch_environment

    reached = {"torch": device == "cpu" or torch.cuda.is_available(), "jax": _jax_reaches(device)}
    if missing := [backend for backend in backends if not reached[backend]]:
        raise HoraError(
            f"--device {device} needs a {device} device that every backend reaches, got none for {', '.join(missing)}: "
            "install its build for CUDA, name methods of the other backend only, or pass --device cpu"
        )
    name = torch.cuda.get_device_name() if device == "cuda" and reached["torch"] else device
    place = jax.devices(device)[0] if reached["jax"] else None
    with jax.default_device(place), patch_environment(accelerate_use_cpu=device == "cpu"):
        yield name


def _jax_reaches(device: Device) -> bool:
    import jax

    try:
        return bool(jax.devices(device))
    except RuntimeError:
        return False
