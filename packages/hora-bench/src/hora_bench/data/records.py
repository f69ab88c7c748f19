"""Instruction records with a short answer: prompts, tokens, log-likelihood scoring and answer patterns."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
from hora_spec import HoraError

from hora_bench.data.base import PARTS, Batch, Judged, Split, balanced, split_by_hash

Scoring = Literal["log-likelihood", "generation"]
LEAD: Final = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
)
PAIRED: Final = ", paired with an input that provides further context"
CUTOFF: Final = 256
BUCKET: Final = 32  # lengths are rounded up: little padding in few shapes, hence few compilations
RESPONSE_BUCKET: Final = 4
MARK: Final = "Answer format:"


@dataclass(frozen=True, slots=True)
class Record:
    """One instruction and its right answer.

    Attributes
    ----------
    prompt
        Everything before the response.
    answer, options
        The right answer, and all that are possible; without options the whole response is the answer.
    before, after
        What the response says around the answer.
    group
        Task that it belongs to.
    pattern
        Regular expression of answers in written responses; empty: the options.
    """

    prompt: str
    answer: str
    options: tuple[str, ...]
    before: str = ""
    after: str = ""
    group: str = ""
    pattern: str = ""

    def response(self, answer: str) -> str:
        """What is to be written where this is the answer."""
        return f"{self.before}{answer}{self.after}"

    def answer_in(self, text: str) -> str | None:
        """The first answer in a written response; None where there is none."""
        if not self.options:
            return text.strip()
        longest = sorted(self.options, key=len, reverse=True)
        pattern = self.pattern or rf"(?<!\w)(?:{'|'.join(map(re.escape, longest))})(?!\w)"
        found = re.search(pattern, text)
        return found.group() if found else None


def prompt_of(instruction: str, given: str = "", *, indent: str = "") -> str:
    """The prompt of Alpaca; LLM-Adapters indents its lines and has spaces after the first."""
    trailing = ("  ", " ")[bool(given)] if indent else ""
    lead = LEAD.format(PAIRED * bool(given)) + trailing
    parts = [f"{lead}\n\n{indent}### Instruction:\n{indent}{instruction}"]
    if given:
        parts.append(f"\n{indent}\n{indent}### Input:\n{indent}{given}")
    return "".join([*parts, f"\n{indent}\n{indent}### Response:\n{indent}"])


def read_records(path: Path, **form: str) -> list[Record]:
    """Records from a file with one JSON object a line.

    Parameters
    ----------
    path
        Each line has ``instruction``, and ``answer`` or ``output`` or both; ``input``, ``options`` and ``group`` if
        wanted. ``output`` is what is trained, and holds the answer. Options are stated by the list ``options`` or
        at the end of the instruction as ``Answer format: yes/no``.
    **form
        As `read_record` takes it.

    Raises
    ------
    HoraError
        There is no such file, or a record says which rule it breaks.
    """
    return [read_record(stored, where, **form) for where, stored in json_lines(path)]


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each object of a file with one JSON object a line is, for messages, and the object.

    Raises
    ------
    HoraError
        There is no such file, or a line is no such object.
    """
    if not path.is_file():
        raise HoraError(f"records are read from a file of JSON lines, got {path}, which does not exist: check the path")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"record {number} of {path.name}"
                yield where, _object(line, where)


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (TypeError, ValueError) as error:
        raise HoraError(f"{where} must be one JSON object on one line, got {error}: fix the line") from error


def read_record(
    stored: Mapping[str, Any], where: str, *, indent: str = "", group: str = "", pattern: str = ""
) -> Record:
    """A record from its fields.

    Raises
    ------
    HoraError
        A field is missing or no text, there is one option only, or the answer is none of them or not in the output.
    """
    texts = {key: stored.get(key) for key in ("instruction", "input", "output", "answer", "group")}
    if wrong := [key for key, value in texts.items() if not isinstance(value, str | None)]:
        raise HoraError(f"{where} must have text in {wrong[0]}, got {texts[wrong[0]]!r}: write it in quotes")
    instruction, given, output, answer = (texts[key] or "" for key in ("instruction", "input", "output", "answer"))
    if not instruction or not (output or answer):
        fix = "run it as sentences" if {"text", "label"} <= set(stored) else "add them"
        raise HoraError(f"{where} must have instruction, and answer or output, got {sorted(stored)}: {fix}")
    options = _options(stored.get("options"), instruction, where)
    answer = answer or output
    if options and answer not in options:
        raise HoraError(f"{where} must answer with one of its options {options}, got {answer!r}: fix answer or options")
    whole = output or answer
    found = [*re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", whole)] or [*re.finditer(re.escape(answer), whole)]
    if not found:
        raise HoraError(
            f"{where} must hold its answer in its output, got {answer!r} and {output!r}: rewrite one of them"
        )
    before, after = whole[: found[-1].start()], whole[found[-1].end() :]
    prompt = prompt_of(instruction, given, indent=indent)
    return Record(prompt, answer, options, before, after, texts["group"] or group, pattern)


def _options(listed: Any, instruction: str, where: str) -> tuple[str, ...]:
    """Options that are stated, or none."""
    if listed is None:
        stated = instruction.rpartition(MARK)[2] if MARK in instruction else ""
        listed = [part.strip() for part in stated.strip().split("\n")[0].split("/")] if stated.strip() else []
        if not listed:
            return ()
    if not (isinstance(listed, list) and all(isinstance(one, str) and one for one in listed)):
        raise HoraError(f"{where} must list its options as texts, got {listed!r}: write a list of texts")
    if len(set(listed)) < 2 or len(set(listed)) != len(listed):
        raise HoraError(f"{where} must have two different options or more, got {listed}: with one, any model is right")
    return tuple(listed)


@dataclass
class TextTask:
    """Records to answer.

    Parameters
    ----------
    name
        Name in results.
    train, val, test
        The splits.
    tokenizer
        A Hugging Face tokenizer, the same for both backends.
    scoring
        ``"log-likelihood"``: the option whose response is the likeliest. ``"generation"``: the first answer in what the
        model writes.
    origin
        Where the data came from, for the result file.

    Raises
    ------
    HoraError
        A split is empty, or records cannot be scored so.
    """

    name: str
    train: list[Record]
    val: list[Record]
    test: list[Record]
    tokenizer: Any
    scoring: Scoring = "log-likelihood"
    origin: dict[str, Any] = field(default_factory=dict)
    kind: Literal["text"] = "text"

    def __post_init__(self) -> None:
        for split in PARTS:
            if not self.records(split):
                raise HoraError(f"{self.name} needs records in every split, got none in {split}: add some")
        if self.scoring == "log-likelihood":
            self._check_options()

    def size(self, split: Split) -> int:
        """Number of records."""
        return len(self.records(split))

    def rows_count(self, split: Split) -> int:
        """One row for each candidate of each record."""
        return sum(len(self._candidates(record)) for record in self.records(split))

    def labels(self, split: Split) -> np.ndarray:
        """The task of each record, so that subsets keep their shares."""
        return np.asarray([record.group for record in self.records(split)])

    def records(self, split: str) -> list[Record]:
        """The records of a split."""
        parts = {"train": self.train, "val": self.val, "test": self.test, "train+val": [*self.train, *self.val]}
        return parts[split]

    def cut(self, limit: int) -> Self:
        """At most so many records of every split, equally many of each task."""
        kept = {part: [self.records(part)[i] for i in balanced(self.labels(part), limit)] for part in PARTS}
        return replace(self, **kept)

    def train_batch(self, split: Split, indices: np.ndarray, rng: np.random.Generator) -> Batch:
        """``tokens (batch, seq)``; ``at``, ``label`` and ``weight (batch, response)``.

        `at` are the positions that predict the response, `label` its tokens, `weight` is 0 for padding.
        """
        records = self.records(split)
        return self._batch([(records[i], records[i].answer, True) for i in indices])

    def eval_batches(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """One row for each candidate of each record, in the order of `by_length`."""
        records = self.records(split)
        rows = [(records[i], one, False) for i in by_length(records) for one in self._candidates(records[i])]
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            yield self._batch(part + part[-1:] * (batch_size - len(part)))

    def judge(self, split: Split, outputs: np.ndarray, written: list[str] | None = None) -> list[Judged]:
        """The likeliest option, or the first answer in `written`; `outputs` are summed log-likelihoods."""
        records, start = self.records(split), 0
        found: dict[int, Judged] = {}
        for i in by_length(records):
            record, candidates = records[i], self._candidates(records[i])
            likelihoods = outputs[start : start + len(candidates)]
            start += len(candidates)
            loss = -float(likelihoods[candidates.index(record.answer)])
            answer = record.answer_in(written[i]) if written is not None else candidates[int(np.argmax(likelihoods))]
            right = record.answer if record.options or written is None else record.response(record.answer).strip()
            found[i] = Judged(f"{split}/{i}", right, answer, answer == right, loss, record.group)
        return [found[i] for i in range(len(records))]

    def fingerprint(self) -> str:
        """Digest of everything that records say."""
        records = [[repr(record) for record in self.records(part)] for part in PARTS]
        return sha256(json.dumps(records).encode()).hexdigest()

    def unreadable(self, split: Split, indices: np.ndarray) -> dict[str, str]:
        """None: a record that cannot be read is an error."""
        return {}

    def description(self) -> dict[str, Any]:
        """Sizes of the splits, prompt, cutoff and origin."""
        sizes = {f"{split}_count": self.size(split) for split in PARTS}
        return {**sizes, "cutoff_tokens": CUTOFF, "loss_on": "response", "example": self.train[0].prompt, **self.origin}

    def prompt_tokens(self, record: Record) -> list[int]:
        """Tokens of the prompt, with the tokenizer's own start token if it has one."""
        tokens = self.tokenizer(record.prompt).input_ids
        return tokens[:-1] if tokens[-1] == self.tokenizer.eos_token_id else tokens

    def _candidates(self, record: Record) -> tuple[str, ...]:
        return record.options if self.scoring == "log-likelihood" else (record.answer,)

    def _check_options(self) -> None:
        """Options can be compared by likelihood only in words that do not tell which of them is right."""
        around: dict[str, tuple[str, str]] = {}
        for split in PARTS:
            for i, record in enumerate(self.records(split)):
                where = f"{self.name}, record {i} of {split},"
                if not record.options:
                    raise HoraError(
                        f"{where} must state its options to be scored by likelihood, got none: add a list options, end "
                        f"the instruction with '{MARK} yes/no', or pass --scoring generation"
                    )
                said = around.setdefault(record.group, (record.before, record.after))
                if said != (record.before, record.after):
                    raise HoraError(
                        f"{where} must say around its answer what the others say, {said}, got "
                        f"{(record.before, record.after)}: it could tell the answer; pass --scoring generation"
                    )

    def _batch(self, rows: list[tuple[Record, str, bool]]) -> Batch:
        encoded = [self._encode(*row) for row in rows]
        seq = rounded(max(len(prompt) + len(response) for prompt, response in encoded), BUCKET)
        width = rounded(max(len(response) for _, response in encoded), RESPONSE_BUCKET)
        tokens = np.full((len(rows), seq), self.tokenizer.eos_token_id, np.int32)
        at, label, weight = (np.zeros((len(rows), width), kind) for kind in (np.int32, np.int32, np.float32))
        for i, (prompt, response) in enumerate(encoded):
            tokens[i, : len(prompt) + len(response)] = [*prompt, *response]
            at[i, : len(response)] = len(prompt) - 1 + np.arange(len(response))
            label[i, : len(response)] = response
            weight[i, : len(response)] = 1
        return {"tokens": tokens, "at": at, "label": label, "weight": weight}

    def _encode(self, record: Record, answer: str, end: bool) -> tuple[list[int], list[int]]:
        """Tokens of prompt and response; a prompt too long for the cutoff loses its beginning."""
        response = self.tokenizer(record.response(answer), add_special_tokens=False).input_ids
        response = [*response, self.tokenizer.eos_token_id] if end else response
        if not 0 < len(response) < CUTOFF:
            raise HoraError(f"a response has 1 to {CUTOFF - 1} tokens, got {len(response)} in {self.name}: shorten it")
        return self.prompt_tokens(record)[-(CUTOFF - len(response)) :], response


def records_task(path: Path, tokenizer: Any, *, scoring: Scoring = "log-likelihood") -> TextTask:
    """A file that is split by content (8 to 1 to 1), or a folder with ``train``, ``val`` and ``test.jsonl``."""
    name = path.resolve().name.removesuffix(".jsonl")
    if path.is_dir():
        train, val, test = (read_records(path / f"{part}.jsonl") for part in PARTS)
        return TextTask(name, train, val, test, tokenizer, scoring, {"source": f"folder {path.name}"})
    records = read_records(path)
    if len(records) < 10:
        raise HoraError(f"a records file needs at least 10 records to be split, got {len(records)} in {path.name}")
    strata = np.asarray([f"{one.group} {one.answer if one.options else ''}" for one in records])
    numbers = split_by_hash([sha256(one.prompt.encode()).hexdigest() for one in records], strata)
    train, val, test = ([records[i] for i in own] for own in numbers)
    return TextTask(name, train, val, test, tokenizer, scoring, {"source": f"file {path.name}, split by content"})


def by_length(records: Sequence[Record]) -> list[int]:
    """Numbers of the records, shortest prompt first: rows of a batch are padded to the longest of them."""
    return sorted(range(len(records)), key=lambda i: len(records[i].prompt))


def rounded(length: int, bucket: int) -> int:
    """The next multiple of `bucket`."""
    return -(-length // bucket) * bucket
