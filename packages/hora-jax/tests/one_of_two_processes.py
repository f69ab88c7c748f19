"""One of two processes with two devices each, which train, gather and save one adapter; run by test_processes.py.

python one_of_two_processes.py PORT INDEX FOLDER
"""

import os
import sys
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}

import hora_jax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hora_jax import Target, adapt, join, split
from hora_spec import AdapterSpec, HoraError
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

LAYERS, D, H, K = 2, 16, 4, 4
TARGETS = [Target(p, p, "l d h k", layer="layers.{l}", module=f"{p}_proj") for p in "qv"]
rng = np.random.default_rng(0)
PARAMS = {name: rng.normal(size=(LAYERS, D, H, K)).astype("float32") / 4 for name in "qv"}
X = rng.normal(size=(4, 6, D)).astype("float32")
SPEC = AdapterSpec(3, hidden_dim=6, head_embed_dim=5, a_source="fixed")
TRAINED = P("data")
"""Layers of the adapter, which both processes have a half of."""


def loss(params, x):
    def layer(x, w):
        q, v = (jnp.einsum("bsd,dhk->bshk", x, w[name]).reshape(x.shape) for name in "qv")
        return x + jnp.tanh(q) * v, None

    return jnp.square(jax.lax.scan(layer, x, params)[0] - 1).mean()


def train(plan, params, phi, x, key):
    """Three steps, with dropout; the adapter and the losses."""
    optimizer, adapted = optax.adam(1e-2), adapt(loss, plan, dense="error", dropout=0.2)

    @jax.jit
    def step(params, trained, fixed, state, x, key):
        def value(trained):
            return adapted(params, join(trained, fixed), x, dropout_key=key)

        now, grads = jax.value_and_grad(value)(trained)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(trained, updates), state, now

    trained, fixed = split(plan, phi)
    state, losses = jax.jit(optimizer.init)(trained), []
    for number in range(3):
        trained, state, value = step(params, trained, fixed, state, x, jax.random.fold_in(key, number))
        losses.append(float(value))
    return join(trained, fixed), losses


def close(got, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected)


def raised(call) -> str:
    try:
        call()
    except HoraError as error:
        return str(error)
    raise AssertionError("nothing was raised")


def gathered(tree):
    return jax.tree.map(lambda v: multihost_utils.process_allgather(v, tiled=True), tree)


def check(plan, put, folder, index):
    """Training on both equals training on one; files hold all of it."""
    phi, key = hora_jax.init(plan), jax.random.key(3)
    spread = {"q": P("data", None, "model"), "v": P(None, ("data", "model"))}
    params = {name: put(value, spread[name]) for name, value in PARAMS.items()}
    x = put(X, P("data"))
    trained, losses = train(plan, params, jax.tree.map(lambda v: put(v, TRAINED), phi), x, key)
    alone, expected = train(plan, PARAMS, phi, X, key)
    close(losses, expected)
    trained = jax.tree.map(lambda v: jax.device_put(v, v.sharding.update(spec=TRAINED)), trained)
    assert not any(v.is_fully_replicated for v in jax.tree.leaves(trained))
    close(gathered(trained), alone)

    hora_jax.save_adapter(folder / "spread", plan, trained)
    close(hora_jax.load_adapter(folder / "spread", plan), gathered(trained), 0)  # at once, in both processes
    hora_jax.export_lora(plan, trained, folder / "lora")
    assert (folder / "lora" / "adapter_model.safetensors").exists()
    close(gathered(hora_jax.merge(plan, params, trained)), hora_jax.merge(plan, PARAMS, gathered(trained)))
    close(gathered(hora_jax.delta(plan, trained)), hora_jax.delta(plan, gathered(trained)))

    whole = jax.tree.map(lambda v: put(v, P()), alone)
    if index == 0:  # what every process holds is saved by one of them, without waiting for the other
        hora_jax.save_adapter(folder / "alone", plan, whole)
        base_of(folder / "base")
    multihost_utils.sync_global_devices("base")
    changed = hora_jax.save_merged(folder / "merged", plan, params, trained, base=folder / "base")
    assert len(changed) == (4 if index == 0 else 0)
    merged = load_file(folder / "merged" / "model.safetensors")
    for i in range(LAYERS):
        for p, value in hora_jax.merge(plan, PARAMS, gathered(trained)).items():
            close(merged[f"layers.{i}.{p}_proj.weight"], np.asarray(value[i]).reshape(D, -1).T)

    message = raised(lambda: hora_jax.save_adapter(folder / "base", plan, trained))
    assert ("the first process" in message) == (index == 1), message

    started, start = hora_jax.joint_a(plan, loss, params, jax.tree.map(lambda v: put(v, P()), phi), [x])
    on_one, _ = hora_jax.joint_a(plan, loss, PARAMS, phi, [X])
    close(started["layers.*"]["a.q"], on_one["layers.*"]["a.q"], 1e-3)
    assert start.params.keys() == {"layers.0", "layers.1"}


def base_of(directory):
    directory.mkdir()
    made = {f"layers.{i}.{p}_proj.weight": PARAMS[p][i].reshape(D, -1).T.copy() for i in range(LAYERS) for p in "qv"}
    save_file(made, directory / "model.safetensors")


def main(port: str, index: int, folder: Path) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    put = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))  # noqa: E731
    check(hora_jax.make_plan(PARAMS, SPEC, TARGETS), put, folder, index)
    print("both agree")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
