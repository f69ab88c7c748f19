"""A tree as MaxText keeps it, layers stacked along the second axis and scanned over: any function, taken by `adapt`.

The model learns to read prose, and its attention is then adapted to code; both come with Python.
"""

import inspect
import pydoc_data.topics

import hora_jax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hora_spec import AdapterSpec

QKV = ("query", "key", "value")


def loss(tree, rows):
    def layer(x, own):
        w, x = own["self_attention"], jax.nn.standardize(x)
        q, k, v = (jnp.einsum("bsd,dhk->bshk", x, w[name]["kernel"]) for name in QKV)
        x = x + jnp.einsum("bshk,dhk->bsd", jax.nn.dot_product_attention(q, k, v, is_causal=True), w["out"]["kernel"])
        return x + jax.nn.relu(x @ own["wi"]) @ own["wi"].T, None

    layers = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), tree["decoder"]["layers"])
    x = jax.nn.standardize(jax.lax.scan(layer, tree["embed"][rows] + tree["positions"], layers)[0][:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(x @ tree["embed"].T, rows[:, 1:]).mean()


def train(function, weights, rows, steps):
    optimizer, gradient = optax.adam(3e-3), jax.jit(jax.grad(function))
    state = optimizer.init(weights)
    for step in range(steps):
        updates, state = optimizer.update(gradient(weights, rows[step * 16 % (len(rows) - 16) :][:16]), state)
        weights = optax.apply_updates(weights, updates)
    return weights


def main(steps: int = 300) -> None:
    texts = "".join(pydoc_data.topics.topics.values()), inspect.getsource(inspect)
    prose, code = (np.frombuffer(t.encode("ascii", "ignore"), np.uint8)[:64_000].reshape(-1, 64) for t in texts)
    draw = iter(jax.random.split(jax.random.key(0), 7))
    kernels = {name: {"kernel": jax.random.normal(next(draw), (64, 4, 4, 16)) / 8} for name in (*QKV, "out")}
    layers = {"self_attention": kernels, "wi": jax.random.normal(next(draw), (64, 4, 128)) / 8}
    embed, positions = (jax.random.normal(next(draw), (rows, 64)) / 8 for rows in (128, 64))
    tree = train(loss, {"decoder": {"layers": layers}, "embed": embed, "positions": positions}, prose, steps)

    plan = hora_jax.make_plan(tree, AdapterSpec(rank=4), hora_jax.presets.maxtext())
    print(plan.report())
    phi = train(lambda phi, rows: hora_jax.adapt(loss, plan)(tree, phi, rows), hora_jax.init(plan), code[:-100], steps)
    losses = [f"{loss(each, code[-100:]):.3f}" for each in (tree, hora_jax.merge(plan, tree, phi))]
    print(f"loss on code that it has not seen: {losses[0]} before, {losses[1]} after, merged")


if __name__ == "__main__":
    main()
