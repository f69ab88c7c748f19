"""What was asked of the method, and what all result files together say: a line a question."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from hora_bench.report.pieces import FILE, TASK
from hora_bench.report.robustness import choice_of
from hora_bench.report.rows import COMPARISONS, Row, is_lora, name_of, of_wrong_labels, proxy_of, rows_of
from hora_bench.report.verdicts import Verdict

Records = Sequence[tuple[Path, dict[str, Any]]]
Judged = Iterable[tuple[str, str]]  # a choice, and the word for it on one task
WORDS: Final = ("better", "worse", "equal")
OTHERWISE: Final = "not resolved"
ALIKE: Final = 0.05
JUDGED: Final[dict[str, tuple[str, ...]]] = {  # page: claims, as verdicts name them
    "signal": ("ours: data ask the heads for alike updates",),
    "rates": (
        "ours: the default has a wider range of learning rates than LoRA",
        "ours: the Hessian at the start explains how high a rate may be",
    ),
    "theory": (
        "polynomial instead of exponential sample complexity",
        "ours: sharing recovers faster with other activations, too",
    ),
}
ASKED: Final = {
    "comparisons": "Which forms are more accurate than LoRA at its number of parameters, each at its own rate?",
    "signal": "Why: what do heads have in common in the gradient?",
    "rates": "How wide is the range of good rates, and does the Hessian at the start explain it?",
    "robustness": "Is any form more robust than LoRA?",
    "theory": "Does sharing recover faster, also with other activations?",
}


def answers(records: Records, found: Sequence[Verdict]) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """Page, question, answer and the commands that make its files again, of questions that have an answer.

    Parameters
    ----------
    records
        Result files of experiments and their content.
    found
        The verdicts on all claims.
    """
    for page, question in ASKED.items():
        said = [*_said(page, records, found)]
        if said:
            commands = dict.fromkeys(command for _, command in said)
            yield page, question, ". ".join(text for text, _ in said) + ".", tuple(commands)


def _said(page: str, records: Records, found: Sequence[Verdict]) -> Iterator[tuple[str, str]]:
    if page == "comparisons":
        yield from _compared(records, wrong=False)
        return
    if page == "robustness":
        yield from _kept(records)
        yield from _compared(records, wrong=True)
        return
    commands = {path: _command(content) for path, content in records}
    for claim in JUDGED[page]:
        verdicts = [(one, one.file) for one in found if one.claim == claim and one.file is not None]
        words = [one.word for one, _ in verdicts]
        counts = ", ".join(f"{word} in {words.count(word)}" for word in dict.fromkeys(words))
        text = claim.removeprefix("ours: ")
        for first, file in verdicts[:1]:
            why = f" ({first.why})" if page == "signal" else ""
            yield f"{text[0].upper()}{text[1:]}: {counts}{why}", commands[file]


def _compared(records: Records, *, wrong: bool) -> Iterator[tuple[str, str]]:
    """Of every tuned comparison, its pieces together, whole models first."""
    found: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for _, content in records:
        result = content["result"]
        if content["experiment"] in COMPARISONS and result.get("search") and of_wrong_labels(result) == wrong:
            found.setdefault((proxy_of(result), _command(content)), []).append(result)
    for (proxy, command), results in sorted(found.items()):
        judged = [(name_of(row), row["word"]) for result in results for row in _as_large(result)]
        named = FILE.search(command)
        if said := _counted(judged):
            kind = "a screen" if proxy else "whole models"
            yield f"{named.group(1) if named else command} ({kind}): {said}", command


def _as_large(result: dict[str, Any]) -> Iterator[Row]:
    """Rows that train as many values as LoRA on their task, within 5 percent."""
    rows = rows_of(result)
    of_lora = {(row["task"], row["fraction"]): row.get("params_count") for row in rows if is_lora(row)}
    for row in rows:
        count, lora = row.get("params_count"), of_lora.get((row["task"], row["fraction"]))
        if count and lora and abs(count / lora - 1) <= ALIKE:
            yield row


def _kept(records: Records) -> Iterator[tuple[str, str]]:
    """Of what is kept under corruptions and attacks."""
    rows = [
        (one["answer"], (choice_of(one)[1], one["word"]), _command(content))
        for _, content in records
        if content["experiment"] == "robustness"
        for one in content["result"]["answers"]
        if "word" in one
    ]
    for answer in dict.fromkeys(answer for answer, _, _ in rows):
        judged = [one for kind, one, _ in rows if kind == answer]
        yield f"Under {answer} (a screen): {_counted(judged)}", rows[0][2]


def _counted(judged: Judged) -> str:
    """Choices by word, with the number of tasks on which each has it; those that have none of the words at the end."""
    words: dict[str, list[str]] = {}
    for choice, word in judged:
        if word:
            words.setdefault(choice, []).append(word)
    parts = []
    for word in WORDS:
        own = [f"`{choice}` on {all_.count(word)} of {len(all_)}" for choice, all_ in words.items() if word in all_]
        parts += [f"{word} {', '.join(own)}"] if own else []
    rest = [f"`{choice}`" for choice, all_ in words.items() if not set(all_) & set(WORDS)]
    return "; ".join([*parts, *([f"{OTHERWISE} {', '.join(rest)}"] if rest else [])])


def _command(content: dict[str, Any]) -> str:
    return TASK.sub("", content["command"])
