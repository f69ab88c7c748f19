"""Instruction records with a short answer: prompts, tokens, log-likelihood scoring and answer patterns."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from hora_spec import HoraError

from hora_bench import assets
from hora_bench.tasks.base import Batch, Score, Split
from hora_bench.tasks.commonsense_data import TASKS

PROMPT: Final = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
FAMILIES: Final = (r"true|false", r"solution[12]", r"answer[1-5]", r"ending[1-4]", r"option[12]")
CUTOFF: Final = 256
BUCKET: Final = 32  # lengths are rounded up: little padding in few shapes, hence few compilations
RESPONSE_BUCKET: Final = 4
VAL_COUNT: Final = 120


@dataclass(frozen=True, slots=True)
class Record:
    """One instruction, its right answer, all answers that are possible, and the task it belongs to."""

    instruction: str
    answer: str
    options: tuple[str, ...]
    group: str

    @property
    def pattern(self) -> str:
        """Regular expression of the answers of its kind."""
        return _family(self.answer)

    @property
    def prompt(self) -> str:
        """Everything before the response."""
        return PROMPT.format(instruction=self.instruction)


def read_records(path: Path, group: str, limit: int | None = None) -> list[Record]:
    """LLM-Adapters records, one JSON object a line: ``{"instruction", "input", "output", "answer"}``.

    Raises
    ------
    HoraError
        There is no such file, or a record is no JSON object, has no answer of a known pattern, or answers with none of
        the options of its instruction.
    """
    if not path.is_file():
        raise HoraError(f"records are read from a file of JSON lines, got {path}, which does not exist: check the path")
    records = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(records) == limit:
                break
            where = f"record {number} of {path.name}"
            try:
                stored = dict(json.loads(line))
            except (TypeError, ValueError) as error:
                raise HoraError(f"{where} must be one JSON object on one line, got {error}: fix the line") from error
            missing = [key for key in ("instruction", "answer") if key not in stored]
            if missing:
                raise HoraError(
                    f"{where} must have {' and '.join(missing)}, got {sorted(stored)}: see the guide on data"
                )
            instruction = f"{stored['instruction']}\n{stored.get('input', '')}".rstrip("\n")
            family = _family(str(stored["answer"]))
            if not family:
                raise HoraError(f"{where} must answer with one of {', '.join(FAMILIES)}, got {stored['answer']!r}")
            listed = instruction.rpartition("Answer format: ")[2].split("/")
            options = tuple(listed) if len(listed) > 1 else tuple(sorted(set(re.findall(family, instruction.lower()))))
            if stored["answer"] not in options:
                raise HoraError(f"{where} must answer with one of its options {options}, got {stored['answer']!r}")
            records.append(Record(instruction, stored["answer"], options, group))
    return records


def answer_in(text: str, record: Record) -> str | None:
    """The first answer of the record's kind in a generated response; None is wrong."""
    found = re.search(record.pattern, text.rpartition("### Response:")[2])
    return found.group() if found else None


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
    origin
        Where the data came from, for the result file.
    """

    name: str
    train: list[Record]
    val: list[Record]
    test: list[Record]
    tokenizer: Any
    origin: dict[str, Any] = field(default_factory=dict)
    kind: Literal["text"] = "text"

    def size(self, split: Split) -> int:
        """Number of records."""
        return len(self.records(split))

    def rows_count(self, split: Split) -> int:
        """One row for each option of each record."""
        return sum(len(record.options) for record in self.records(split))

    def labels(self, split: Split) -> np.ndarray:
        """The task of each record, so that subsets keep their shares."""
        return np.asarray([record.group for record in self.records(split)])

    def records(self, split: str) -> list[Record]:
        """The records of a split."""
        parts = {"train": self.train, "val": self.val, "test": self.test, "train+val": [*self.train, *self.val]}
        return parts[split]

    def train_batch(self, split: Split, indices: np.ndarray, rng: np.random.Generator) -> Batch:
        """``tokens (batch, seq)``; ``at``, ``label`` and ``weight (batch, response)``.

        `at` are the positions that predict the response, `label` its tokens, `weight` is 0 for padding.
        """
        records = self.records(split)
        return self._batch([(records[i], records[i].answer, True) for i in indices])

    def eval_batches(self, split: Split, batch_size: int) -> Iterator[Batch]:
        """One row for each option of each record, in the order of `by_length`."""
        records = self.records(split)
        rows = [(records[i], option, False) for i in by_length(records) for option in records[i].options]
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            yield self._batch(part + part[-1:] * (batch_size - len(part)))

    def score(self, split: Split, outputs: np.ndarray) -> Score:
        """Accuracy of the most likely option, the mean over tasks; `outputs` are summed log-likelihoods."""
        records, start = self.records(split), 0
        right = np.zeros(len(records), bool)
        for i in by_length(records):
            options = records[i].options
            right[i] = options[int(np.argmax(outputs[start : start + len(options)]))] == records[i].answer
            start += len(options)
        return Score.of(right, [record.group for record in records])

    def score_generated(self, split: Split, responses: list[str]) -> Score:
        """Accuracy of the first answer pattern in each generated response."""
        records = self.records(split)
        right = [answer_in(text, record) == record.answer for text, record in zip(responses, records, strict=True)]
        return Score.of(np.asarray(right), [record.group for record in records])

    def fingerprint(self) -> str:
        """Digest of all instructions and answers."""
        records = [*self.train, *self.val, *self.test]
        return sha256("\0".join(f"{r.instruction}\0{r.answer}" for r in records).encode()).hexdigest()

    def unreadable(self, split: Split, indices: np.ndarray) -> dict[str, str]:
        """None: a record that cannot be read is an error."""
        return {}

    def description(self) -> dict[str, Any]:
        """Sizes of the splits, prompt, cutoff and origin."""
        sizes = {f"{split}_count": self.size(split) for split in ("train", "val", "test")}
        return {**sizes, "cutoff_tokens": CUTOFF, "loss_on": "response", "prompt": PROMPT, **self.origin}

    def prompt_tokens(self, record: Record) -> list[int]:
        """Tokens of the prompt, with the tokenizer's own start token if it has one."""
        tokens = self.tokenizer(record.prompt).input_ids
        return tokens[:-1] if tokens[-1] == self.tokenizer.eos_token_id else tokens

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
        response = self.tokenizer(f"the correct answer is {answer}", add_special_tokens=False).input_ids
        response = [*response, self.tokenizer.eos_token_id] if end else response
        return self.prompt_tokens(record)[-(CUTOFF - len(response)) :], response


def commonsense(tokenizer: Any, *, limit: int | None = None, folder: Path | None = None) -> TextTask:
    """The eight tasks together: trained on all, tested on each.

    Parameters
    ----------
    tokenizer
        Of the model.
    limit
        At most so many records for training and for testing, equally many of each task.
    folder
        With ``TASK/train.jsonl`` and ``TASK/test.jsonl``; default the asset.
    """
    asset = assets.find("commonsense")
    folder = folder or asset.get()
    each = None if limit is None else -(-limit // len(TASKS))
    spare = VAL_COUNT // len(TASKS) if each is None else max(1, each // 10)
    train, val, test = [], [], []
    for task in TASKS:
        records = read_records(folder / task / "train.jsonl", task, each)
        val += records[:spare]
        train += records[spare:]
        test += read_records(folder / task / "test.jsonl", task, each)
    origin = dict(asset.origin or {}) if folder == asset.path else {"source": f"folder {folder.name}"}
    return TextTask("commonsense", train, val, test, tokenizer, origin)


def records_file(path: Path, tokenizer: Any, *, limit: int | None = None) -> TextTask:
    """One file: every tenth record tests, every tenth validates, the rest trains."""
    records = read_records(path, path.stem, limit)
    if len(records) < 10:
        raise HoraError(f"a records file needs at least 10 records to be split, got {len(records)} in {path.name}")
    test, val = records[9::10], records[8::10]
    train = [record for i, record in enumerate(records) if i % 10 < 8]
    return TextTask(path.stem, train, val, test, tokenizer, {"source": f"file {path.name}"})


def _family(answer: str) -> str:
    return next((family for family in FAMILIES if re.fullmatch(family, answer)), "")


def by_length(records: Sequence[Record]) -> list[int]:
    """Numbers of the records, shortest prompt first: rows of a batch are padded to the longest of them."""
    return sorted(range(len(records)), key=lambda i: len(records[i].prompt))


def rounded(length: int, bucket: int) -> int:
    """The next multiple of `bucket`."""
    return -(-length // bucket) * bucket
