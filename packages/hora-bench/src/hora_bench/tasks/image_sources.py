"""Where images come from: embedded digits, Fashion-MNIST, and the folder layouts of VTAB-1K and FGVC."""

import gzip
import json
import tarfile
from pathlib import Path
from typing import Any, Final

import numpy as np
from hora_spec import HoraError

from hora_bench import assets
from hora_bench.cache import cache_dir, new_directory, one_at_a_time
from hora_bench.tasks.images import Augmentation, Examples, ImageTask

VTAB: Final = {
    "cifar": 100, "caltech101": 102, "dtd": 47, "oxford_flowers102": 102, "oxford_iiit_pet": 37, "svhn": 10,
    "sun397": 397, "patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5,
    "clevr_count": 8, "clevr_dist": 6, "dmlab": 6, "kitti": 4, "dsprites_loc": 16, "dsprites_ori": 16,
    "smallnorb_azi": 18, "smallnorb_ele": 9,
}  # fmt: skip
FGVC: Final = {"CUB": 200, "NABirds": 555, "OxfordFlower": 102, "StanfordDog": 120, "StanfordCar": 196}


def digits(image_size: int) -> ImageTask:
    """scikit-learn's 1797 handwritten digits of 8x8 pixels: 800 to train, 200 to validate, 797 to test."""
    from sklearn.datasets import load_digits

    stored = load_digits()
    images = (stored.images * (255 / 16)).round().astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    parts = [Examples(list(images[part]), stored.target[part]) for part in np.split(order, [800, 1000])]
    origin = {"source": "scikit-learn load_digits", "licence": "BSD-3-Clause"}
    return ImageTask("digits", 10, *parts, image_size=image_size, origin=origin)


def fashion_mnist(image_size: int) -> ImageTask:
    """Fashion-MNIST: 50,000 to train, the last 10,000 of its training set to validate, 10,000 to test."""
    asset = assets.find("fashion-mnist")
    folder = asset.get()
    arrays = {}
    for stem, part in (("train", "train"), ("t10k", "test")):
        for kind, skip in (("images-idx3", 16), ("labels-idx1", 8)):
            with gzip.open(folder / f"{stem}-{kind}-ubyte.gz") as file:
                arrays[part, kind[:6]] = np.frombuffer(file.read()[skip:], np.uint8)
        arrays[part, "images"] = arrays[part, "images"].reshape(-1, 28, 28)
    images, labels = arrays["train", "images"], arrays["train", "labels"].astype(np.int64)
    train, val = (Examples(list(images[p]), labels[p]) for p in (slice(50_000), slice(50_000, None)))
    test = Examples(list(arrays["test", "images"]), arrays["test", "labels"].astype(np.int64))
    return ImageTask("fashion-mnist", 10, train, val, test, image_size=image_size, origin=dict(asset.origin or {}))


def image_folder(
    folder: Path, image_size: int, *, name: str | None = None, num_classes: int | None = None
) -> ImageTask:
    """A folder, or an archive of one, in the layout that NOAH and others use for VTAB-1K.

    Parameters
    ----------
    folder
        Holds ``train800.txt``, ``val200.txt`` and ``test.txt`` (any ``train*.txt`` and ``val*.txt`` without
        the other's name); a line is a path relative to the folder and a label. An archive (``.tar``, ``.tar.gz``) is
        unpacked into the cache once.
    image_size
        Height and width in pixels.
    name
        Name in results; default the folder's or the archive's without endings.
    num_classes
        Default: the largest label and one.

    Raises
    ------
    HoraError
        A split file is missing or names a file that does not exist.
    """
    name = name or (folder.resolve().name if folder.is_dir() else folder.name.split(".")[0])
    folder = _unpacked(folder)
    train, val, test = (_read_split(folder, _split_file(folder, split)) for split in ("train", "val", "test"))
    largest = max(int(examples.classes.max()) for examples in (train, val, test))
    return ImageTask(
        name,
        num_classes or largest + 1,
        train,
        val,
        test,
        image_size=image_size,
        origin={"source": f"folder {folder.name} in VTAB-1K layout"},
    )


def vtab(task: str, folder: Path, image_size: int) -> ImageTask:
    """One of the 19 tasks of VTAB-1K: ``FOLDER/TASK`` in the layout of `image_folder`."""
    if task not in VTAB:
        raise HoraError(f"a VTAB-1K task is one of {', '.join(VTAB)}, got {task!r}")
    return image_folder(folder / task, image_size, name=f"vtab/{task}", num_classes=VTAB[task])


def fgvc(task: str, folder: Path, image_size: int) -> ImageTask:
    """One of the 5 FGVC data sets with VPT's splits: ``FOLDER/TASK/{train,val,test}.json``, path to label."""
    if task not in FGVC:
        raise HoraError(f"an FGVC task is one of {', '.join(FGVC)}, got {task!r}")
    train, val, test = (_read_json(folder / task, f"{split}.json") for split in ("train", "val", "test"))
    augmentation: Augmentation = "crop-flip"
    return ImageTask(
        f"fgvc/{task}",
        FGVC[task],
        train,
        val,
        test,
        image_size=image_size,
        augmentation=augmentation,
        origin={"source": "FGVC images with the splits of VPT"},
    )


def _unpacked(path: Path) -> Path:
    if path.is_dir():
        return path
    if not path.exists():
        raise HoraError(
            f"image-folder reads a folder or an archive of one, got {path}, which does not exist: check the path"
        )
    if not tarfile.is_tarfile(path):
        raise HoraError(f"image-folder reads a folder or a tar archive, got {path}: unpack it and pass the folder")
    target = cache_dir() / "folders" / f"{path.name.split('.')[0]}-{path.stat().st_size}"
    with one_at_a_time(target):
        if not target.exists():
            with new_directory(target) as temporary, tarfile.open(path) as archive:
                archive.extractall(temporary, filter="data")
    folders = [child for child in sorted(target.iterdir()) if child.is_dir()]
    return target if any(target.glob("*.txt")) or not folders else folders[0]


def _split_file(folder: Path, split: str) -> Path:
    plain = [f for f in sorted(folder.glob(f"{split}*.txt")) if not (split == "train" and "val" in f.name)]
    if not plain:
        raise HoraError(
            f"{folder} must hold a {split}*.txt (train800.txt, val200.txt, test.txt), got none: see the guide"
        )
    return plain[0]


def _read_split(folder: Path, file: Path) -> Examples:
    sources, labels = [], []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        path, _, label = line.rpartition(" ")
        if not path or not label.lstrip("-").isdigit():
            raise HoraError(f"a line of {file.name} is a path and a label, got {line!r} in line {number}: fix the file")
        sources.append(folder / path)
        labels.append(int(label))
    return Examples(_existing(sources, file), np.asarray(labels))


def _read_json(folder: Path, name: str) -> Examples:
    file = folder / name
    if not file.exists():
        raise HoraError(f"{folder} must hold {name} with VPT's split, got none: see the guide on data")
    content: dict[str, Any] = json.loads(file.read_text())
    base = folder / "images" if (folder / "images").is_dir() else folder
    return Examples(_existing([base / path for path in content], file), np.asarray([int(v) for v in content.values()]))


def _existing(sources: list[Path], file: Path) -> list[Path]:
    missing = [source for source in sources if not source.exists()]
    if missing:
        raise HoraError(
            f"every file named in {file.name} must exist, got {len(missing)} missing, such as {missing[0]}: "
            "restore them or remove their lines"
        )
    return sources
