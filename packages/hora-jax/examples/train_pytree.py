"""Fine-tune two projections of a plain dict of arrays with HoRA: any function, no modules, no dense gradients."""

import hora_jax
import jax
import jax.numpy as jnp
import optax
from hora_spec import AdapterSpec

params = {"attn": dict(zip("qkv", jax.random.normal(jax.random.key(0), (3, 32, 32)) / 6, strict=True))}
targets = [hora_jax.Target(f"*.{p}", p, "(h k) d", heads=4, layer="{0}") for p in "qv"]
plan = hora_jax.make_plan(params, AdapterSpec(rank=4), targets=targets)
phi, optimizer, losses = hora_jax.init(plan, seed=0), optax.adam(3e-3), []
x = jax.random.normal(jax.random.key(1), (16, 8, 32))


def loss(params, x):
    heads = ((x @ params["attn"][p].T).reshape(16, 8, 4, 8) for p in "qkv")
    return jnp.mean((jax.nn.dot_product_attention(*heads).mean((1, 2, 3)) - jnp.sin(4 * x.mean((1, 2)))) ** 2)


gradient = jax.jit(jax.value_and_grad(hora_jax.adapt(loss, plan), argnums=1))
state = optimizer.init(phi)
for _ in range(50):
    value, gradients = gradient(params, phi, x)
    updates, state = optimizer.update(gradients, state)
    phi, losses = optax.apply_updates(phi, updates), [*losses, float(value)]
merged = hora_jax.merge(plan, params, phi)
