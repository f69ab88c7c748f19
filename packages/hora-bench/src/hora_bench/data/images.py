"""Image classification: decoding, resizing and normalising, in memory or from files."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
from hora_spec import HoraError
from jaxtyping import Float, UInt8
from PIL import Image
from scipy.special import log_softmax

from hora_bench.data.base import PARTS, Batch, Judged, Split, balanced

MAX_BAD_FRACTION: Final = 0.01
DECODED_BYTES: Final = 2 * 2**30  # of training images kept in memory
WORKERS: Final = min(8, os.cpu_count() or 1)

Augmentation = Literal["none", "crop-flip"]


@dataclass(frozen=True, slots=True)
class Stored:
    """An encoded image that is no file of its own, and what to call it."""

    name: str
    data: bytes


Source = Path | Stored | np.ndarray


@dataclass(frozen=True, slots=True)
class View:
    """How a checkpoint wants to see images: per channel ``(x - mean) / std`` of values in 0 to 1, resized so."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Literal["bicubic", "bilinear", "lanczos", "nearest"] = "bicubic"


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
    view
        How the checkpoint normalises.
    augmentation
        ``"none"`` resizes to the size (VTAB); ``"crop-flip"`` resizes the shorter side to 8/7 of it and takes a
        random crop and flip in training, the centre in testing (FGVC).
    class_names
        Of the classes, where they have names.
    origin
        Where the data came from, for the result file.

    Raises
    ------
    HoraError
        A split is empty, there is one class only, or a label is out of range.
    """

    name: str
    num_classes: int
    train: Examples
    val: Examples
    test: Examples
    image_size: int
    view: View = field(default_factory=View)
    augmentation: Augmentation = "none"
    class_names: tuple[str, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)
    kind: Literal["images"] = "images"

    def __post_init__(self) -> None:
        self.bad_images: dict[str, str] = {}
        self._readable: set[str] = set()
        self._decoded: dict[str, np.ndarray] = {}
        self._room = DECODED_BYTES
        self._fingerprint = ""
        if self.num_classes < 2:
            raise HoraError(f"{self.name} needs at least two classes, got {self.num_classes}: add examples of another")
        for split in PARTS:
            classes = self._examples(split).classes
            if not len(classes):
                raise HoraError(f"{self.name} needs examples in every split, got none in {split}: add some")
            if not (classes.min() >= 0 and classes.max() < self.num_classes):
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

    def cut(self, limit: int) -> Self:
        """At most so many examples of every split, equally many of each class."""
        parts = {part: self._examples(part) for part in PARTS}
        return replace(self, **{part: old.take(balanced(old.classes, limit)) for part, old in parts.items()})

    def shuffled(self) -> Self:
        """The task with the labels of training and validation permuted: nothing can be learned from it."""
        rng = np.random.default_rng(0)
        parts = {part: self._examples(part) for part in ("train", "val")}
        permuted = {part: replace(old, classes=rng.permutation(old.classes)) for part, old in parts.items()}
        return replace(self, name=f"{self.name}-shuffled", **permuted)

    def wrong(self, share: float) -> Self:
        """The task with another class as the label of this share of training and validation; the test stays right."""
        rng, parts = np.random.default_rng(0), {}
        for part in ("train", "val"):
            classes = self._examples(part).classes.copy()
            rows = rng.permutation(len(classes))[: round(share * len(classes))]
            classes[rows] = (classes[rows] + rng.integers(1, self.num_classes, len(rows))) % self.num_classes
            parts[part] = replace(self._examples(part), classes=classes)
        return replace(self, name=f"{self.name}-wrong{100 * share:g}", **parts)

    def changed(self, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Self:
        """The task with every test image changed at the size that the model sees; what is learned from stays.

        Parameters
        ----------
        name
            Follows the task's name.
        change
            From pixels ``(height, width, 3)`` of bytes to others; an image that does not decode stays as it is.

        Raises
        ------
        HoraError
            Images are cut while they are read, so that a changed one would be cut again.
        """
        if self.augmentation != "none":
            raise HoraError(
                f"images that are changed are seen whole, got {self.name} with {self.augmentation}: drop it"
            )
        read = [self._read(source) for source in self.test.sources]
        pairs = zip(self.test.sources, read, strict=True)
        sources = [source if pixels is None else change(pixels) for source, pixels in pairs]
        return replace(self, name=f"{self.name}-{name}", test=replace(self.test, sources=sources))

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

    def judge(
        self, split: Split, outputs: Float[np.ndarray, "rows classes"], written: list[str] | None = None
    ) -> list[Judged]:
        """The largest output is the answer; images that did not decode are left out (and named in the result)."""
        examples = self._examples(split)
        likelihood = log_softmax(outputs[: len(examples.classes)].astype(np.float64), axis=1)
        found = []
        for i, (name, label) in enumerate(zip(self._shown(split), examples.classes.tolist(), strict=True)):
            if _name(examples.sources[i]) not in self.bad_images:
                best = int(outputs[i].argmax())
                loss = -float(likelihood[i, label])
                found.append(Judged(name, self._called(label), self._called(best), best == label, loss))
        return found

    def fingerprint(self) -> str:
        """Digest of the splits: the bytes of every image, in order, and its class."""
        if not self._fingerprint:
            digest = sha256()
            for examples in (self.train, self.val, self.test):
                digest.update("".join(digests(examples.sources)).encode())
                digest.update(examples.classes.astype(np.int64).tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def unreadable(self, split: Split, indices: np.ndarray) -> dict[str, str]:
        """Those of some examples that do not decode, named from the folder that holds all files, and why.

        What an earlier process saw is looked at again, so that a resumed run says the same.
        """
        examples = self._examples(split).take(indices)
        for source in examples.sources:
            if _name(source) not in self._readable:
                self._read(source)
        shown = self._shown(split)
        names = (_name(source) for source in examples.sources)
        return {
            shown[i]: self.bad_images[name]
            for i, name in zip(indices.tolist(), names, strict=True)
            if name in self.bad_images
        }

    def description(self) -> dict[str, Any]:
        """Sizes of the splits, preprocessing and origin."""
        sizes = {f"{split}_count": self.size(split) for split in PARTS}
        return {
            "num_classes": self.num_classes,
            **({"class_names": list(self.class_names)} if self.class_names else {}),
            **sizes,
            "image_size_px": self.image_size,
            "mean": list(self.view.mean),
            "std": list(self.view.std),
            "interpolation": self.view.interpolation,
            "augmentation": self.augmentation,
            **self.origin,
        }

    def _examples(self, split: str) -> Examples:
        if split == "train+val":
            sources = [*self.train.sources, *self.val.sources]
            return Examples(sources, np.concatenate([self.train.classes, self.val.classes]))
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def _called(self, label: int) -> str:
        return self.class_names[label] if self.class_names else str(label)

    def _shown(self, split: str) -> list[str]:
        """Names of examples that mean something elsewhere: paths within the data, or numbers in the split."""
        everything = [source for part in PARTS for source in self._examples(part).sources]
        files = [str(source) for source in everything if isinstance(source, Path)]
        root = os.path.commonpath(files) if files else ""
        root = os.path.dirname(root) if len(set(files)) == 1 else root
        return [
            os.path.relpath(source, root) if isinstance(source, Path) else _name(source) or f"{split}/{i}"
            for i, source in enumerate(self._examples(split).sources)
        ]

    def _batch(self, examples: Examples, rng: np.random.Generator | None) -> Batch:
        images, weights = [], []
        with ThreadPoolExecutor(WORKERS) as pool:
            read = list(pool.map(self._read, examples.sources))
        for source, stored in zip(examples.sources, read, strict=True):
            if rng is not None and stored is not None:
                self._remember(_name(source), stored)
            weights.append(float(stored is not None))
            blank = np.zeros((self.image_size, self.image_size, 3), np.uint8)
            images.append(blank if stored is None else self._seen(stored, rng))
        mean, std = (np.array(values, np.float32) for values in (self.view.mean, self.view.std))
        return {
            "image": (np.stack(images).astype(np.float32) / 255 - mean) / std,
            "label": examples.classes.astype(np.int32),
            "weight": np.asarray(weights, np.float32),
        }

    def _read(self, source: Source) -> UInt8[np.ndarray, "height width 3"] | None:
        name = _name(source)
        if name in self.bad_images:
            return None
        if name in self._decoded:
            return self._decoded[name]
        square = self.augmentation == "none"
        side = self.image_size if square else round(self.image_size * 8 / 7)
        try:
            with _opened(source) as image:
                stored = _resize(_rgb(image), side, square=square, interpolation=self.view.interpolation)
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
        total = sum(self.size(split) for split in PARTS)
        if len(self.bad_images) > MAX_BAD_FRACTION * total:
            raise HoraError(
                f"{self.name}: at most 1 % of the images may be unreadable, got {len(self.bad_images)} of {total}, "
                f"such as {', '.join(sorted(self.bad_images)[:3])}: restore the files"
            )

    def _seen(self, stored: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        size = self.image_size
        spare = np.array(stored.shape[:2]) - size
        top, left = spare // 2 if rng is None else rng.integers(0, spare + 1)
        view = stored[top : top + size, left : left + size]
        if self.augmentation == "crop-flip" and rng is not None and rng.random() < 0.5:
            view = view[:, ::-1]
        return view


def digests(sources: Sequence[Source]) -> list[str]:
    """sha256 of the bytes of each image."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(_digest, sources))


def _digest(source: Source) -> str:
    if isinstance(source, Path):
        return sha256(source.read_bytes()).hexdigest()
    if isinstance(source, Stored):
        return sha256(source.data).hexdigest()
    return sha256(f"{source.shape} {source.dtype}".encode() + source.tobytes()).hexdigest()


def _name(source: Source) -> str:
    """What messages and the memory of decoded images call it; an array has no name."""
    return source.name if isinstance(source, Stored) else str(source) if isinstance(source, Path) else ""


def _opened(source: Source) -> Image.Image:
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    return Image.open(io.BytesIO(source.data) if isinstance(source, Stored) else source)


def _rgb(image: Image.Image) -> Image.Image:
    """Three channels of 8 bits; Pillow alone would make all but the darkest of deeper pixels white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range: store 8 or 16 bits")
    return image.convert("RGB")


def _resize(image: Image.Image, side: int, *, square: bool, interpolation: str) -> np.ndarray:
    width, height = image.size
    if square:
        width = height = side
    else:
        scale = side / min(image.size)
        width, height = max(side, round(width * scale)), max(side, round(height * scale))
    return np.asarray(image.resize((width, height), Image.Resampling[interpolation.upper()]))
