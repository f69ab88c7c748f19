"""Fine-tune two projections of a plain dict of arrays with HoRA: no modules, no dense gradients."""

import hora_jax
import jax
import jax.numpy as jnp
import optax
from hora_jax.functional import hora_linear
from hora_spec import AdapterSpec

params = {"attn": dict(zip("qkv", jax.random.normal(jax.random.key(0), (3, 32, 32)) / 6, strict=True))}
targets = [hora_jax.Target(f"*.{p}", p, "(h k) d", heads=4, layer="{0}") for p in "qv"]
plan = hora_jax.make_plan(params, AdapterSpec(rank=4), targets=targets)
phi = hora_jax.init(plan, seed=0)
x = jax.random.normal(jax.random.key(1), (16, 8, 32))


def loss(phi):
    w, f = params["attn"], hora_jax.factors(plan, phi)["attn"]
    q, v = (hora_linear(x, w[p], None, f[p], 1.0) for p in "qv")
    heads = (t.reshape(16, 8, 4, 8) for t in (q, x @ w["k"].T, v))
    return jnp.mean((jax.nn.dot_product_attention(*heads).mean((1, 2, 3)) - jnp.sin(4 * x.mean((1, 2)))) ** 2)


optimizer, losses = optax.adam(3e-3), []
state, gradient = optimizer.init(phi), jax.jit(jax.value_and_grad(loss))
for _ in range(50):
    value, gradients = gradient(phi)
    updates, state = optimizer.update(gradients, state)
    phi, losses = optax.apply_updates(phi, updates), [*losses, float(value)]
merged = hora_jax.merge(plan, params, phi)
