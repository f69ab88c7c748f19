"""A stack of equal layers: unrolled or scanned, optionally rematerialised."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def make_layers(make: Callable[[nnx.Rngs], nnx.Module], depth: int, *, scan: bool, rngs: nnx.Rngs) -> Any:
    """`depth` layers as a list or as one module whose parameters carry a leading layer axis.

    Parameters
    ----------
    make
        Builds one layer from its random streams.
    depth
        Number of layers.
    scan
        False: an `nnx.List` (paths ``layers.3.mlp...``). True: one module, every parameter ``(layers, ...)``.
    rngs
        Random streams; the scanned form draws different values for each layer.
    """
    if not scan:
        return nnx.List([make(rngs) for _ in range(depth)])
    return nnx.split_rngs(splits=depth)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


def run_layers(layers: Any, x: jax.Array, *args: Any, cache: Any = None, remat: bool = False) -> tuple[Any, Any]:
    """Apply ``layer(x, *args, cache) -> (x, cache)`` in order.

    Parameters
    ----------
    layers
        What `make_layers` returned.
    x
        Activations that flow through the stack.
    *args
        The same for every layer (rotary tables, mask).
    cache
        A pytree whose leaves have a leading layer axis, or None.
    remat
        Recompute each layer's activations in the backward pass instead of keeping them.

    Returns
    -------
    tuple
        The last activations and the caches, stacked again (None without a cache).
    """
    if isinstance(layers, nnx.List):
        caches = []
        for index, layer in enumerate(layers):
            own = jax.tree.map(lambda leaf, index=index: leaf[index], cache)
            x, own = _rematerialised(layer)(x, *args, own) if remat else layer(x, *args, own)
            caches.append(own)
        return x, None if cache is None else jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *caches)

    graph, state = nnx.split(layers)

    def step(x: jax.Array, own: tuple[Any, Any]) -> tuple[jax.Array, Any]:
        return nnx.merge(graph, own[0])(x, *args, own[1])

    return jax.lax.scan(jax.checkpoint(step) if remat else step, x, (state, cache))


def _rematerialised(layer: nnx.Module) -> Callable[..., Any]:
    graph, state = nnx.split(layer)
    apply = jax.checkpoint(lambda state, *args: nnx.merge(graph, state)(*args))
    return lambda *args: apply(state, *args)
