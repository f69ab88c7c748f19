"""hora-jax without Flax: a function is adapted, trained for a step and merged; what needs Flax says so."""

import sys
import tempfile

import hora_jax
import jax
import jax.numpy as jnp
from hora_spec import AdapterSpec

key = jax.random.key(0)
kernels = jax.random.normal(key, (2, 32, 4, 8)) / 6
params = {"attn": {"query": {"kernel": kernels[0]}, "value": {"kernel": kernels[1]}}}
targets = [hora_jax.Target(f"attn.{name}.kernel", name[0], "d h k") for name in ("query", "value")]


def forward(params, x):
    q, v = (jnp.einsum("sd,dhk->hsk", x, params["attn"][name]["kernel"]) for name in ("query", "value"))
    return jnp.einsum("hst,htk->hsk", jax.nn.softmax(jnp.einsum("hsk,htk->hst", q, q)), v)


plan = hora_jax.make_plan(params, AdapterSpec(rank=4), targets=targets)
phi, x = hora_jax.init(plan, seed=0), jax.random.normal(key, (6, 32))
adapted = hora_jax.adapt(forward, plan)
for _ in range(2):
    gradient = jax.grad(lambda phi: jnp.sum(adapted(params, phi, x) ** 2))(phi)
    phi = jax.tree.map(lambda value, slope: value - 1e-2 * slope, phi, gradient)
difference = adapted(params, phi, x) - forward(hora_jax.merge(plan, params, phi), x)
assert jnp.abs(difference).max() < 1e-4, difference
assert jnp.abs(adapted(params, phi, x) - forward(params, x)).max() > 1e-4
with tempfile.TemporaryDirectory() as folder:
    hora_jax.save_adapter(f"{folder}/adapter", plan, phi)
    loaded = hora_jax.load_adapter(f"{folder}/adapter", plan)
assert jax.tree.all(jax.tree.map(jnp.array_equal, loaded, phi))
try:
    import hora_jax.nnx
except ImportError as error:
    print(f"without the extra: {error}")
else:
    sys.exit("hora_jax.nnx needs Flax, and was imported without")
