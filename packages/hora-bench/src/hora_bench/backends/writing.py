"""Answers written on JAX: the likeliest token each time, with a key-value cache."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from hora_jax.nnx import HoraModel


@partial(jax.jit, static_argnums=0, static_argnames="new_tokens")
def greedy(
    graph: Any, params: Any, frozen: Any, tokens: jax.Array, valid: jax.Array, end: int, *, new_tokens: int
) -> jax.Array:
    """The likeliest next token, `new_tokens` times; after an end token only end tokens follow.

    Parameters
    ----------
    graph, params, frozen
        A split `Llama`, or a model around one.
    tokens, valid
        From `hora_bench.data.prompts.left_padded`.
    end
        Id of the end token.

    Returns
    -------
    array
        Ids ``(batch, new_tokens)``.
    """
    model, args, written = (
        nnx.merge(graph, params, frozen),
        (tokens, valid, end),
        partial(_greedy, new_tokens=new_tokens),
    )
    # inside one call the factors are generated once, not for every token
    return model.apply(written, *args) if isinstance(model, HoraModel) else written(model, *args)


def _greedy(model: Any, tokens: jax.Array, valid: jax.Array, end: int, *, new_tokens: int) -> jax.Array:
    graph, state = nnx.split(model)
    batch, seq = tokens.shape
    keys = jnp.concatenate([valid, jnp.ones((batch, new_tokens), bool)], axis=1)
    cache = model.init_cache(batch, seq + new_tokens)
    logits, cache = model(tokens, valid=keys, cache=cache, at=jnp.full((batch, 1), seq - 1))

    def unfinished(carry: Any) -> jax.Array:
        step, _, done, _, _ = carry
        return (step < new_tokens) & ~done.all()

    def write(carry: Any) -> Any:
        step, token, done, cache, ids = carry
        ids, done = ids.at[:, step].set(token), done | (token == end)
        logits, cache = nnx.merge(graph, state)(token[:, None], valid=keys, cache=cache)
        return step + 1, jnp.where(done, end, logits[:, 0].argmax(-1)), done, cache, ids

    first, nothing = logits[:, 0].argmax(-1), jnp.full((batch, new_tokens), end)
    return jax.lax.while_loop(unfinished, write, (0, first, jnp.zeros(batch, bool), cache, nothing))[-1]
