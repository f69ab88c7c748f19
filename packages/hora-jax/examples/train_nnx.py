"""Fine-tune the attention of a Flax NNX model with HoRA, save the adapter, and serve the merged model."""

import hora_jax
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from hora_jax.nnx import HoraModel, HoraParam
from hora_spec import AdapterSpec

base = nnx.Sequential(nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0)), lambda x: x.mean(axis=(1, 2)))
plan = hora_jax.make_plan(base, AdapterSpec(rank=4), hora_jax.presets.attention())
print(plan.report())
model = HoraModel(base, plan, hora_jax.init(plan, seed=0))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=HoraParam)
x = jax.random.normal(jax.random.key(0), (16, 8, 32))
y = jnp.sin(4 * x.mean(axis=(1, 2)))


@nnx.jit
def step(model, optimizer):
    gradient = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2), argnums=nnx.DiffState(0, HoraParam))
    loss, gradients = gradient(model)
    optimizer.update(model, gradients)
    return loss


losses = [float(step(model, optimizer)) for _ in range(50)]
hora_jax.save_adapter("adapter", plan, model.adapter())
served = model.merged()
