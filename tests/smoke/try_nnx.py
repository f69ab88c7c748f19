"""hora-jax with its extra: an NNX model is adapted and called."""

import hora_jax
import jax
from flax import nnx
from hora_jax import presets
from hora_jax.nnx import HoraModel, HoraParam
from hora_spec import AdapterSpec

base = nnx.Sequential(nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0)))
plan = hora_jax.make_plan(base, AdapterSpec(rank=4), presets.attention())
print(plan.report())
model = HoraModel(base, plan, hora_jax.init(plan, seed=0))
x = jax.random.normal(jax.random.key(0), (2, 5, 32))
assert (model(x) == base(x)).all()
assert jax.tree.leaves(nnx.state(model, HoraParam))
