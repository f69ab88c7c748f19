"""Answers written out: beam search on torch (`transformers`), greedy with a key-value cache on JAX."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hora_bench.tasks.text import BUCKET, CUTOFF, Record, TextTask, by_length, rounded

BEAMS = 4
NEW_TOKENS = 16
BATCH = 16


def respond(
    learner: Any, task: TextTask, records: list[Record], *, progress: Callable[[int], None] = lambda done: None
) -> list[str]:
    """The response to each record's prompt.

    Parameters
    ----------
    learner
        Of either backend.
    task
        For its tokenizer.
    records
        What to answer.
    progress
        Called with the number of records done.
    """
    write = _jax if hasattr(learner, "graph") else _torch
    order = by_length(records)
    responses: dict[int, str] = {}
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        prompts = [task.prompt_tokens(records[i])[-(CUTOFF - NEW_TOKENS) :] for i in part]
        prompts += prompts[-1:] * (BATCH - len(part))
        tokens, valid = left_padded(prompts, task.tokenizer.eos_token_id)
        written = write(learner, tokens, valid, task.tokenizer.eos_token_id)
        for i, ids in zip(part, written, strict=False):
            responses[i] = task.tokenizer.decode(ids, skip_special_tokens=True)
        progress(len(responses))
    return [responses[i] for i in range(len(records))]


def left_padded(prompts: list[list[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts that end in the same column, and which of their positions are real."""
    width = rounded(max(map(len, prompts)), BUCKET)
    tokens = np.array([[pad] * (width - len(ids)) + ids for ids in prompts], np.int32)
    valid = np.array([[False] * (width - len(ids)) + [True] * len(ids) for ids in prompts])
    return tokens, valid


def _torch(learner: Any, tokens: np.ndarray, valid: np.ndarray, end: int) -> np.ndarray:
    import torch

    module = learner.accelerator.unwrap_model(learner.logits)
    device = learner.accelerator.device
    module.eval()
    with torch.no_grad():
        written = module.model.generate(
            input_ids=torch.from_numpy(tokens).long().to(device),
            attention_mask=torch.from_numpy(valid).long().to(device),
            num_beams=BEAMS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=end,
            eos_token_id=end,
        )
    return written[:, tokens.shape[1] :].cpu().numpy()


def _jax(learner: Any, tokens: np.ndarray, valid: np.ndarray, end: int) -> np.ndarray:
    return np.asarray(greedy(learner.graph, learner.params, learner.frozen, tokens, valid, end))


@partial(jax.jit, static_argnums=0)
def greedy(graph: Any, params: Any, frozen: Any, tokens: jax.Array, valid: jax.Array, end: int) -> jax.Array:
    """The likeliest next token, `NEW_TOKENS` times; after an end token only end tokens follow.

    Parameters
    ----------
    graph, params, frozen
        A split `Llama`, or a model around one.
    tokens, valid
        From `left_padded`.
    end
        Id of the end token.

    Returns
    -------
    array
        Ids ``(batch, NEW_TOKENS)``.
    """
    from flax import nnx

    model = nnx.merge(graph, params, frozen)
    batch, seq = tokens.shape
    keys = jnp.concatenate([valid, jnp.ones((batch, NEW_TOKENS), bool)], axis=1)
    base = getattr(model, "base", model)
    cache = base.init_cache(batch, seq + NEW_TOKENS)
    last = jnp.full((batch, 1), seq - 1)
    logits, cache = model(tokens, valid=keys, cache=cache, at=last)

    def write(carry: Any, _: None) -> tuple[Any, jax.Array]:
        token, cache, done = carry
        token = jnp.where(done, end, token)
        done = done | (token == end)
        logits, cache = nnx.merge(graph, params, frozen)(token[:, None], valid=keys, cache=cache)
        return (logits[:, 0].argmax(-1), cache, done), token

    first = logits[:, 0].argmax(-1)
    _, written = jax.lax.scan(write, (first, cache, jnp.zeros(batch, bool)), None, length=NEW_TOKENS)
    return written.T
