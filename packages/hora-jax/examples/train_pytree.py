"""Fine-tune two projections of a plain dict of arrays with HoRA: no modules, no dense gradients."""

import hora_jax
import jax
import jax.numpy as jnp
import optax
from hora_jax.functional import hora_linear
from hora_spec import AdapterSpec

keys = jax.random.split(jax.random.key(0), 3)
params = {"attn": {name: jax.random.normal(key, (32, 32)) / 6 for name, key in zip("qkv", keys, strict=True)}}
targets = [hora_jax.Target(f"*.{p}", p, "(h k) d", heads=4, layer="{0}") for p in "qv"]
plan = hora_jax.plan(params, AdapterSpec(rank=4), targets)
phi = hora_jax.init(plan, seed=0)
x = jax.random.normal(jax.random.key(1), (16, 8, 32))
y = jnp.sin(4 * x.mean(axis=(1, 2)))


def forward(phi, x):
    w, f = params["attn"], hora_jax.factors(plan, phi)["attn"]
    q, v = (hora_linear(x, w[p], None, f[p], 1.0).reshape(16, 8, 4, 8) for p in "qv")
    k = (x @ w["k"].T).reshape(16, 8, 4, 8)
    return jax.nn.dot_product_attention(q, k, v).mean(axis=(1, 2, 3))


optimizer = optax.adam(3e-3)
state = optimizer.init(phi)
step = jax.jit(jax.value_and_grad(lambda phi: jnp.mean((forward(phi, x) - y) ** 2)))
losses = []
for _ in range(50):
    loss, gradients = step(phi)
    updates, state = optimizer.update(gradients, state, phi)
    phi = optax.apply_updates(phi, updates)
    losses.append(float(loss))
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
merged = hora_jax.merge(plan, params, phi)
