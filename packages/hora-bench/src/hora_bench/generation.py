"""Answers written out: beam search on torch (`transformers`), greedy with a key-value cache on JAX."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hora_bench.tasks.base import Batch
from hora_bench.tasks.text import BUCKET, CUTOFF, Record, TextTask, by_length, rounded

BEAMS = 4
NEW_TOKENS = 16
BATCH = 16


def prompts(task: TextTask, records: list[Record]) -> Iterator[Batch]:
    """Prompts in the order of `by_length`: ``tokens`` and ``valid (BATCH, seq)``; the last batch is padded."""
    order = by_length(records)
    for start in range(0, len(order), BATCH):
        part = [task.prompt_tokens(records[i])[-(CUTOFF - NEW_TOKENS) :] for i in order[start : start + BATCH]]
        yield left_padded(part + part[-1:] * (BATCH - len(part)), task.tokenizer.eos_token_id)


def write(learner: Any, end: int, batch: Batch) -> np.ndarray:
    """Ids ``(BATCH, NEW_TOKENS)`` that a learner of either backend writes after prompts, `end` from the end on."""
    return (_jax if hasattr(learner, "graph") else _torch)(learner, end, batch)


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


def _torch(learner: Any, end: int, batch: Batch) -> np.ndarray:
    import torch

    module = learner.accelerator.unwrap_model(learner.logits)
    module.eval()
    local = learner.local(batch)
    with torch.no_grad():
        written = module.generate(
            input_ids=local["tokens"].long(),
            attention_mask=local["valid"].long(),
            num_beams=BEAMS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=end,
            eos_token_id=end,
            synced_gpus=learner.accelerator.num_processes > 1,  # processes that share weights stop together
        )
    ids = written[:, batch["tokens"].shape[1] :]
    ids = torch.nn.functional.pad(ids, (0, NEW_TOKENS - ids.shape[1]), value=end)
    return learner.gathered(ids, len(batch["tokens"]))


def _jax(learner: Any, end: int, batch: Batch) -> np.ndarray:
    written = greedy(learner.graph, learner.params, learner.frozen, batch["tokens"], batch["valid"], end)
    return np.asarray(written)


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
    from hora_jax.nnx import HoraModel

    model, args = nnx.merge(graph, params, frozen), (tokens, valid, end)
    # inside one call the factors are generated once, not for every token
    return model.apply(_greedy, *args) if isinstance(model, HoraModel) else _greedy(model, *args)


def _greedy(model: Any, tokens: jax.Array, valid: jax.Array, end: int) -> jax.Array:
    from flax import nnx

    graph, state = nnx.split(model)
    batch, seq = tokens.shape
    keys = jnp.concatenate([valid, jnp.ones((batch, NEW_TOKENS), bool)], axis=1)
    cache = model.init_cache(batch, seq + NEW_TOKENS)
    logits, cache = model(tokens, valid=keys, cache=cache, at=jnp.full((batch, 1), seq - 1))

    def unfinished(carry: Any) -> jax.Array:
        step, _, done, _, _ = carry
        return (step < NEW_TOKENS) & ~done.all()

    def write(carry: Any) -> Any:
        step, token, done, cache, ids = carry
        ids, done = ids.at[:, step].set(token), done | (token == end)
        logits, cache = nnx.merge(graph, state)(token[:, None], valid=keys, cache=cache)
        return step + 1, jnp.where(done, end, logits[:, 0].argmax(-1)), done, cache, ids

    first, nothing = logits[:, 0].argmax(-1), jnp.full((batch, NEW_TOKENS), end)
    return jax.lax.while_loop(unfinished, write, (0, first, jnp.zeros(batch, bool), cache, nothing))[-1]
