"""Image classification: decoding, resizing and normalising, in memory or from files."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from hora_spec import HoraError
from jaxtyping import Float, UInt8
from PIL import Image

from hora_bench.tasks.base import Batch, Score, Split

MEAN: Final = np.array([0.485, 0.456, 0.406], np.float32)
STD: Final = np.array([0.229, 0.224, 0.225], np.float32)
MAX_BAD_FRACTION: Final = 0.01
DECODED_BYTES: Final = 2 * 2**30  # of training images kept in memory

Source = Path | np.ndarray
Augmentation = Literal["none", "crop-flip"]


@dataclass(frozen=True)
class Examples:
    """Images (files, or arrays ``(height, width)`` or ``(height, width, 3)`` of bytes) and their classes."""

    sources: Sequence[Source]
    classes: np.ndarray

    def take(self, indices: np.ndarray) -> "Examples":
        """Some of them, in that order."""
        return Examples([self.sources[i] for i in indices], self.classes[indices])


@dataclass
class ImageTask:
    """Classification of images.

    Parameters
    ----------
    name
        Name in results.
    num_classes
        Number of classes.
    train, val, test
        The splits; `train` and `val` together are what the final model learns from.
    image_size
        Height and width in pixels that the model sees.
    augmentation
        ``"none"`` resizes to the size (VTAB); ``"crop-flip"`` resizes the shorter side to 8/7 of it and takes a
        random crop and flip in training, the centre in testing (FGVC).
    origin
        Where the data came from, for the result file.
    """

    name: str
    num_classes: int
    train: Examples
    val: Examples
    test: Examples
    image_size: int
    augmentation: Augmentation = "none"
    origin: dict[str, Any] = field(default_factory=dict)
    kind: Literal["images"] = "images"

    def __post_init__(self) -> None:
        self.bad_images: dict[str, str] = {}
        self._readable: set[str] = set()
        self._decoded: dict[str, np.ndarray] = {}
        self._room = DECODED_BYTES
        for split in ("train", "val", "test"):
            classes = self._examples(split).classes
            if len(classes) and not (classes.min() >= 0 and classes.max() < self.num_classes):
                wrong = classes[(classes < 0) | (classes >= self.num_classes)][0]
                raise HoraError(
                    f"{self.name}: labels must be in [0, {self.num_classes}), got {wrong} in {split}: fix the file"
                )

    def size(self, split: Split) -> int:
        """Number of examples."""
        return len(self._examples(split).classes)

    def rows_count(self, split: Split) -> int:
        """One row for each example."""
        return self.size(split)

    def labels(self, split: Split) -> np.ndarray:
        """Class of each example."""
        return self._examples(split).classes

    def train_batch(self, split: Split, indices: np.ndarray, rng: np.random.Generator) -> Batch:
        """``image (batch, height, width, 3)`` float32 normalised, ``label (batch,)``, ``weight (batch,)``.

        An image that does not decode has weight 0.
        """
        return self._batch(self._examples(split).take(indices), rng)

    def eval_batches(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """All examples in order."""
        examples = self._examples(split)
        for start in range(0, len(examples.classes), batch_size):
            indices = np.arange(start, start + batch_size)
            inside = np.minimum(indices, len(examples.classes) - 1)
            batch = self._batch(examples.take(inside), None)
            yield batch | {"weight": np.where(indices == inside, batch["weight"], 0).astype(np.float32)}

    def score(self, split: Split, outputs: Float[np.ndarray, "rows classes"]) -> Score:
        """Accuracy of the largest output; images that did not decode are left out (and named in the result)."""
        examples = self._examples(split)
        predicted = outputs[: len(examples.classes)].argmax(axis=1)
        readable = np.array([str(source) not in self.bad_images for source in _names(examples)], bool)
        return Score.of((predicted == examples.classes)[readable])

    def fingerprint(self) -> str:
        """Digest of the splits: names, or pixels where there are no files, and classes."""
        digest = sha256()
        for examples in (self.train, self.val, self.test):
            for source in examples.sources:
                digest.update(source.name.encode() if isinstance(source, Path) else source.tobytes())
            digest.update(examples.classes.astype(np.int64).tobytes())
        return digest.hexdigest()

    def unreadable(self, split: Split, indices: np.ndarray) -> dict[str, str]:
        """Those of some examples that do not decode, named from the folder that holds all files, and why.

        What an earlier process saw is looked at again, so that a resumed run says the same.
        """
        examples = self._examples(split).take(indices)
        for source, name in zip(examples.sources, _names(examples), strict=True):
            if name not in self._readable:
                self._read(source, name)
        bad = [name for name in _names(examples) if name in self.bad_images]
        files = [name for part in (self.train, self.val, self.test) for name in _names(part) if name]
        return {os.path.relpath(name, os.path.commonpath(files)): self.bad_images[name] for name in bad}

    def description(self) -> dict[str, Any]:
        """Sizes of the splits, preprocessing and origin."""
        sizes = {f"{split}_count": self.size(split) for split in ("train", "val", "test")}
        return {
            "num_classes": self.num_classes,
            **sizes,
            "image_size_px": self.image_size,
            "augmentation": self.augmentation,
            **self.origin,
        }

    def _examples(self, split: str) -> Examples:
        if split == "train+val":
            sources = [*self.train.sources, *self.val.sources]
            return Examples(sources, np.concatenate([self.train.classes, self.val.classes]))
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def _batch(self, examples: Examples, rng: np.random.Generator | None) -> Batch:
        images, weights = [], []
        for source, name in zip(examples.sources, _names(examples), strict=True):
            stored = self._read(source, name)
            if rng is not None and stored is not None:
                self._remember(name, stored)
            weights.append(float(stored is not None))
            blank = np.zeros((self.image_size, self.image_size, 3), np.uint8)
            images.append(blank if stored is None else self._view(stored, rng))
        image = (np.stack(images).astype(np.float32) / 255 - MEAN) / STD
        return {
            "image": image,
            "label": examples.classes.astype(np.int32),
            "weight": np.asarray(weights, np.float32),
        }

    def _read(self, source: Source, name: str) -> UInt8[np.ndarray, "height width 3"] | None:
        if name in self.bad_images:
            return None
        if name in self._decoded:
            return self._decoded[name]
        side = self.image_size if self.augmentation == "none" else round(self.image_size * 8 / 7)
        try:
            with Image.open(source) if isinstance(source, Path) else Image.fromarray(source) as opened:
                stored = _resize(_rgb(opened), side, square=self.augmentation == "none")
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            if not name:
                raise
            self._bad(name, error)
            return None
        self._readable.add(name)
        return stored

    def _remember(self, name: str, stored: np.ndarray) -> None:
        """Keep what training will ask for again, while there is room."""
        if name and name not in self._decoded and stored.nbytes <= self._room:
            self._decoded[name] = stored
            self._room -= stored.nbytes

    def _bad(self, name: str, error: Exception) -> None:
        self.bad_images[name] = str(error).replace(name, Path(name).name)
        total = sum(self.size(split) for split in ("train", "val", "test"))
        if len(self.bad_images) > MAX_BAD_FRACTION * total:
            raise HoraError(
                f"{self.name}: at most 1 % of the images may be unreadable, got {len(self.bad_images)} of {total}, "
                f"such as {', '.join(sorted(self.bad_images)[:3])}: restore the files"
            )

    def _view(self, stored: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        size = self.image_size
        spare = np.array(stored.shape[:2]) - size
        top, left = spare // 2 if rng is None else rng.integers(0, spare + 1)
        view = stored[top : top + size, left : left + size]
        if self.augmentation == "crop-flip" and rng is not None and rng.random() < 0.5:
            view = view[:, ::-1]
        return view


def _rgb(image: Image.Image) -> Image.Image:
    """Three channels of 8 bits; Pillow alone would make all but the darkest of deeper pixels white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range: store 8 or 16 bits")
    return image.convert("RGB")


def _resize(image: Image.Image, side: int, *, square: bool) -> np.ndarray:
    width, height = image.size
    if square:
        width = height = side
    else:
        scale = side / min(image.size)
        width, height = max(side, round(width * scale)), max(side, round(height * scale))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _names(examples: Examples) -> list[str]:
    """A name per image for messages and for the memory of decoded files; arrays have none."""
    return [str(source) if isinstance(source, Path) else "" for source in examples.sources]
