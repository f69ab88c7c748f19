"""Corruptions of images at the size that the model sees, as ImageNet-C has them; each from a library."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any, Final

import numpy as np
from hora_spec import HoraError
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageFilter

Pixels = UInt8[np.ndarray, "height width 3"]


def _noise(image: Image.Image, deviation: float) -> Image.Image:
    """Gaussian, drawn from the pixels: equal images get equal noise, wherever they stand."""
    clean = np.asarray(image)
    rng = np.random.default_rng(int.from_bytes(sha256(clean.tobytes()).digest()))
    return Image.fromarray(np.clip(np.rint(clean + rng.normal(0, deviation, clean.shape)), 0, 255).astype(np.uint8))


def _blur(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def _contrast(image: Image.Image, kept: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(kept)


def _jpeg(image: Image.Image, quality: float) -> Image.Image:
    written = io.BytesIO()
    image.save(written, "JPEG", quality=round(quality))
    return Image.open(written).convert("RGB")


CORRUPTIONS: Final[dict[str, tuple[Callable[[Image.Image, float], Image.Image], float, float, str]]] = {
    "noise": (_noise, 0, 255, "standard deviation, of 255"),
    "blur": (_blur, 0, 100, "radius in pixels"),
    "contrast": (_contrast, 0, 1, "share kept"),
    "jpeg": (_jpeg, 1, 95, "quality"),
}


def corrupt(pixels: Pixels, kind: str, strength: float) -> Pixels:
    """An image with one corruption.

    Parameters
    ----------
    pixels
        As the model sees them, before normalisation.
    kind
        One of `CORRUPTIONS`.
    strength
        Noise: standard deviation, of 255. Blur: radius of Pillow's Gaussian, in pixels. Contrast: share of the distance
        from the mean grey that is kept. JPEG: quality.
    """
    return np.asarray(CORRUPTIONS[kind][0](Image.fromarray(pixels), strength))


def corruptions_of(given: Mapping[str, Any]) -> dict[str, list[float]]:
    """Kinds and their strengths, from a file.

    Raises
    ------
    HoraError
        There are none, or another kind, or a strength out of its range, or the same twice.
    """
    if not isinstance(given, Mapping) or not given or (unknown := sorted(set(given) - set(CORRUPTIONS))):
        got = ", ".join(unknown) if isinstance(given, Mapping) and given else repr(given)
        raise HoraError(f"corruptions are {', '.join(CORRUPTIONS)}, each with its strengths, got {got}: change it")
    for kind, strengths in given.items():
        _, low, high, unit = CORRUPTIONS[kind]
        listed = isinstance(strengths, Sequence) and not isinstance(strengths, str) and len(strengths) > 0
        numbers = listed and all(type(one) in (int, float) and low < one <= high for one in strengths)
        if not numbers or len(set(strengths)) < len(strengths):
            raise HoraError(
                f"strengths of {kind} ({unit}) are different numbers above {low} and up to {high}, got {strengths!r}: "
                "change it"
            )
    return {kind: [*strengths] for kind, strengths in given.items()}


def named(kind: str, strength: float) -> str:
    """What a corruption is called in results."""
    return f"{kind} {strength:g}"
