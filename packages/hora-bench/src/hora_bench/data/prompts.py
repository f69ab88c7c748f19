"""Prompts to be answered in writing, in batches that end in the same column, and the answers as text."""

from collections.abc import Iterator

import numpy as np

from hora_bench.data.base import Batch
from hora_bench.data.records import BUCKET, CUTOFF, Record, TextTask, by_length, rounded

BATCH = 16


def prompts(task: TextTask, records: list[Record], new_tokens: int) -> Iterator[Batch]:
    """Prompts in the order of `by_length`: ``tokens`` and ``valid (BATCH, seq)``; the last batch is padded."""
    order = by_length(records)
    for start in range(0, len(order), BATCH):
        part = [task.prompt_tokens(records[i])[-(CUTOFF - new_tokens) :] for i in order[start : start + BATCH]]
        yield left_padded(part + part[-1:] * (BATCH - len(part)), task.tokenizer.eos_token_id)


def responses(task: TextTask, records: list[Record], written: np.ndarray) -> list[str]:
    """Text in the order of the records, from what was written after `prompts`."""
    ids = dict(zip(by_length(records), written, strict=False))
    return [task.tokenizer.decode(ids[i], skip_special_tokens=True) for i in range(len(records))]


def left_padded(prompts: list[list[int]], pad: int) -> Batch:
    """``tokens`` of prompts that end in the same column, and ``valid``: which of their positions are real."""
    width = rounded(max(map(len, prompts)), BUCKET)
    tokens = np.array([[pad] * (width - len(ids)) + ids for ids in prompts], np.int32)
    valid = np.array([[False] * (width - len(ids)) + [True] * len(ids) for ids in prompts])
    return {"tokens": tokens, "valid": valid}
