"""Equinox: attention that was trained on images of five digits, adapted with HoRA to the five others.

The images, real handwritten digits, come with scikit-learn; a row of pixels is a token.
"""

import equinox as eqx
import hora_jax
import jax
import jax.numpy as jnp
import optax
from hora_spec import AdapterSpec
from sklearn.datasets import load_digits


def logits(model, images):
    def one(image):
        x = jax.vmap(model["embed"])(image) + model["positions"]
        return model["head"]((x + model["attn"](x, x, x)).reshape(-1))

    return jax.vmap(one)(images)


def loss(model, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits(model, images), labels).mean()


def train(function, trained, images, labels, steps):
    optimizer, gradient = optax.adam(3e-3), eqx.filter_jit(eqx.filter_grad(function))
    state = optimizer.init(eqx.filter(trained, eqx.is_inexact_array))
    for step in range(steps):
        batch = slice(start := step * 32 % (len(images) - 32), start + 32)
        updates, state = optimizer.update(gradient(trained, images[batch], labels[batch]), state)
        trained = eqx.apply_updates(trained, updates)
    return trained


def main(steps: int = 400) -> None:
    images, labels = (jnp.asarray(part) for part in load_digits(return_X_y=True))
    images, low = images.reshape(-1, 8, 8) / 16, labels < 5
    keys = jax.random.split(jax.random.key(0), 4)
    model = {"embed": eqx.nn.Linear(8, 32, key=keys[0]), "attn": eqx.nn.MultiheadAttention(4, 32, key=keys[1])}
    model |= {"positions": jax.random.normal(keys[2], (8, 32)), "head": eqx.nn.Linear(256, 5, key=keys[3])}
    model = train(loss, model, images[low], labels[low], steps)

    images, labels = images[~low], labels[~low] - 5
    plan = hora_jax.make_plan(model, AdapterSpec(rank=4), hora_jax.presets.equinox())
    adapted = hora_jax.adapt(loss, plan)
    phi = train(
        lambda phi, *batch: adapted(model, phi, *batch), hora_jax.init(plan), images[:-300], labels[:-300], steps
    )
    for name, each in (("before", model), ("after, merged", hora_jax.merge(plan, model, phi))):
        right = (logits(each, images[-300:]).argmax(1) == labels[-300:]).mean()
        print(f"{name}: {right:.1%} of 300 held-out images of other digits right")


if __name__ == "__main__":
    main()
