"""Images in folders: class folders, the lists of VTAB-1K, the splits of FGVC, and what `datasets` saves."""

import json
import tarfile
from collections.abc import Callable
from hashlib import file_digest
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
from hora_spec import HoraError
from PIL import Image

from hora_bench.cache import cache_dir, new_directory, one_at_a_time
from hora_bench.data.base import PARTS, SHARES, split_by_hash
from hora_bench.data.images import Augmentation, Examples, ImageTask, Source, Stored, View, digests

VTAB: Final = {
    "cifar": 100, "caltech101": 102, "dtd": 47, "oxford_flowers102": 102, "oxford_iiit_pet": 37, "svhn": 10,
    "sun397": 397, "patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5,
    "clevr_count": 8, "clevr_dist": 6, "dmlab": 6, "kitti": 4, "dsprites_loc": 16, "dsprites_ori": 16,
    "smallnorb_azi": 18, "smallnorb_ele": 9,
}  # fmt: skip
FGVC: Final = {"CUB": 200, "NABirds": 555, "OxfordFlower": 102, "StanfordDog": 120, "StanfordCar": 196}

SPLIT_WORDS: Final = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}

Parts = dict[str, Examples]
Found = tuple[Parts, tuple[str, ...], str]  # splits, names of the classes, what the layout is called


def image_folder(
    folder: Path,
    image_size: int,
    *,
    name: str | None = None,
    num_classes: int | None = None,
    augmentation: Augmentation = "none",
    view: View | None = None,
) -> ImageTask:
    """Images in a folder, or in an archive of one, in any of the layouts of `LAYOUTS`.

    Parameters
    ----------
    folder
        An archive (``.tar``, ``.tar.gz``) is unpacked into the cache once.
    image_size
        Height and width in pixels.
    name
        Name in results; default the folder's or the archive's without endings.
    num_classes
        Default: as many as there are names, or the largest label and one.
    augmentation, view
        Of the task.

    Raises
    ------
    HoraError
        The folder has none of the layouts, or several, or a file is missing.
    """
    name = name or (folder.resolve().name if folder.is_dir() else folder.name.split(".")[0])
    folder = _unpacked(folder)
    fitting = [read for fits, read in LAYOUTS if fits(folder)]
    if len(fitting) != 1:
        got = "several of them" if fitting else "none of them"
        raise HoraError(
            f"{folder} must hold images in one layout: train*.txt, val*.txt and test*.txt; train.json, val.json and "
            "test.json; a folder for each class; train and test with a folder for each class; or what datasets saves, "
            f"got {got}: see the guide on data"
        )
    parts, names, layout = fitting[0](folder)
    largest = max((int(examples.classes.max()) for examples in parts.values() if len(examples.classes)), default=0)
    return ImageTask(
        name,
        num_classes or len(names) or largest + 1,
        parts["train"],
        parts["val"],
        parts["test"],
        image_size=image_size,
        view=view or View(),
        augmentation=augmentation,
        class_names=names,
        origin={"source": f"folder {folder.name}", "layout": layout},
    )


def _unpacked(path: Path) -> Path:
    if path.is_dir():
        return path
    if not path.exists():
        raise HoraError(f"images are read from a folder or an archive of one, got {path}, which does not exist")
    if not tarfile.is_tarfile(path):
        raise HoraError(f"images are read from a folder or a tar archive, got {path}: unpack it and pass the folder")
    with path.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()[:16]
    target = cache_dir() / "folders" / f"{path.name.split('.')[0]}-{digest}"
    with one_at_a_time(target):
        if not target.exists():
            with new_directory(target) as temporary, tarfile.open(path) as archive:
                archive.extractall(temporary, filter="data")
    children = [child for child in sorted(target.iterdir()) if not child.name.startswith(".")]
    return children[0] if len(children) == 1 and children[0].is_dir() else target


# lists: a path and a label per line


def _has_lists(folder: Path) -> bool:
    return any(folder.glob("train*.txt")) or any(folder.glob("test*.txt"))


def _lists(folder: Path) -> Found:
    return {part: _read_list(folder, _list_file(folder, part)) for part in PARTS}, (), "lists"


def _list_file(folder: Path, split: str) -> Path:
    plain = [f for f in sorted(folder.glob(f"{split}*.txt")) if not (split == "train" and "val" in f.name)]
    if len(plain) != 1:
        got = ", ".join(file.name for file in plain) or "none"
        raise HoraError(f"{folder} must hold one {split}*.txt (train800.txt, val200.txt, test.txt), got {got}")
    return plain[0]


def _read_list(folder: Path, file: Path) -> Examples:
    sources, labels = [], []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        path, _, label = line.rpartition(" ")
        if not path or not label.removeprefix("-").isdecimal():
            raise HoraError(f"a line of {file.name} is a path and a label, got {line!r} in line {number}: fix the file")
        sources.append(folder / path)
        labels.append(int(label))
    return Examples(_existing(sources, file), np.asarray(labels, np.int64))


# splits of VPT: path to label


def _has_splits(folder: Path) -> bool:
    return any((folder / f"{part}.json").exists() for part in PARTS)


def _splits(folder: Path) -> Found:
    return {part: _read_split(folder, f"{part}.json") for part in PARTS}, (), "splits of VPT"


def _read_split(folder: Path, name: str) -> Examples:
    file = folder / name
    if not file.exists():
        raise HoraError(f"{folder} must hold {name} with VPT's split, got none: see the guide on data")
    content: Any = json.loads(file.read_text())
    try:
        labels = np.asarray([int(label) for label in content.values()], np.int64)
    except (AttributeError, TypeError, ValueError) as error:
        raise HoraError(f"{name} must map paths to labels, got {error}: fix the file") from error
    base = folder / "images" if (folder / "images").is_dir() else folder
    return Examples(_existing([base / path for path in content], file), labels)


def _existing(sources: list[Path], file: Path) -> list[Source]:
    missing = [source for source in sources if not source.is_file()]
    if missing:
        raise HoraError(
            f"every file named in {file.name} must exist, got {len(missing)} missing, such as {missing[0]}: "
            "restore them or remove their lines"
        )
    return [*sources]


# class folders, of all examples or of each split


def _has_split_folders(folder: Path) -> bool:
    return not _others(folder) and (folder / "train").is_dir() and any((folder / part).is_dir() for part in PARTS[1:])


def _has_class_folders(folder: Path) -> bool:
    return not (_others(folder) or _has_split_folders(folder)) and len(_class_folders(folder)) > 1


def _others(folder: Path) -> bool:
    return _has_lists(folder) or _has_splits(folder) or _has_dataset(folder)


def _split_folders(folder: Path) -> Found:
    names = _class_folders(folder / "train")
    for part in PARTS[1:]:
        if (folder / part).is_dir() and (own := _class_folders(folder / part)) != names:
            differ = ", ".join(sorted(set(own) ^ set(names))[:3])
            raise HoraError(f"{part} must have the classes of train, got a difference in {differ}: add or remove them")
    given = {part: _read_classes(folder / part, names) for part in PARTS if (folder / part).is_dir()}
    return _completed(given), tuple(names), "class folders in " + ", ".join(given)


def _class_tree(folder: Path) -> Found:
    names = _class_folders(folder)
    if splits := sorted({name for name in names if name.lower() in SPLIT_WORDS}):
        raise HoraError(f"splits are in folders train, val and test, got {', '.join(splits)} as classes: rename them")
    return _shared_out(_read_classes(folder, names)), tuple(names), "class folders, split by content"


def _class_folders(folder: Path) -> list[str]:
    """Names of the folders that hold images, at any depth."""
    children = (child for child in sorted(folder.iterdir()) if child.is_dir() and not child.name.startswith("."))
    return [child.name for child in children if next(_images(child), None) is not None]


def _read_classes(folder: Path, names: list[str]) -> Examples:
    found = [(path, label) for label, name in enumerate(names) for path in sorted(_images(folder / name))]
    return Examples([path for path, _ in found], np.asarray([label for _, label in found], np.int64))


def _images(folder: Path) -> Any:
    endings = Image.registered_extensions()
    files = (path for path in folder.rglob("*") if not any(p.startswith(".") for p in path.relative_to(folder).parts))
    return (path for path in files if path.suffix.lower() in endings and path.is_file())


def _shared_out(examples: Examples) -> Parts:
    numbers = split_by_hash(digests(examples.sources), examples.classes)
    return {part: examples.take(own) for part, own in zip(PARTS, numbers, strict=True)}


def _completed(given: Parts) -> Parts:
    """All three splits: without a test split validation examples test, and a tenth of training validates instead."""
    if len(given) == len(PARTS):
        return given
    test = given.get("test") or given["val"]
    train = given["train"]
    numbers = split_by_hash(digests(train.sources), train.classes, (SHARES[0] + SHARES[1], SHARES[2]))
    return {"train": train.take(numbers[0]), "val": train.take(numbers[1]), "test": test}


# what datasets.save_to_disk writes


def _has_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def _dataset(folder: Path) -> Found:
    try:
        datasets: Any = import_module("datasets")  # no requirement of ours
    except ImportError as error:
        raise HoraError(f"{folder} was saved by datasets, which is not installed: pip install datasets") from error
    stored = datasets.load_from_disk(str(folder))
    splits: dict[str, Any] = {"train": stored}
    if isinstance(stored, datasets.DatasetDict):
        splits = {str(name): part for name, part in stored.items()}
    renamed = {"val" if name == "validation" else name: part for name, part in splits.items()}
    if "train" not in renamed or not set(renamed) <= set(PARTS):
        raise HoraError(f"a dataset has the splits train, validation and test, got {', '.join(splits)}: rename them")
    features = renamed["train"].features
    image = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    label = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(image) != 1 or len(label) != 1:
        raise HoraError(f"a dataset has one Image and one ClassLabel column, got {image} and {label}: select columns")
    given = {}
    for part, rows in renamed.items():
        encoded = rows.cast_column(image[0], datasets.Image(decode=False))[image[0]]
        data = (one["bytes"] or Path(one["path"]).read_bytes() for one in encoded)
        sources = [Stored(f"{part}/{i}", one) for i, one in enumerate(data)]
        given[part] = Examples(sources, np.asarray(rows[label[0]], np.int64))
    parts = _shared_out(given["train"]) if len(given) == 1 else _completed(given)
    return parts, tuple(features[label[0]].names), "datasets"


LAYOUTS: Final[tuple[tuple[Callable[[Path], bool], Callable[[Path], Found]], ...]] = (
    (_has_lists, _lists),
    (_has_splits, _splits),
    (_has_split_folders, _split_folders),
    (_has_class_folders, _class_tree),
    (_has_dataset, _dataset),
)
