"""Where arrays live on a mesh of devices: weights over both axes, batches over ``fsdp``, adapters everywhere."""

import math
from typing import Any, Final

import jax
from hora_spec import HoraError
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

ROWS_BY_TP: Final = (
    "o_proj",
    "down_proj",
    "proj",
    "fc2",
    "embed_tokens",
)  # tp splits their inputs


def make_mesh(axes: dict[str, int]) -> Mesh:
    """A mesh with the axes fsdp and tp.

    Raises
    ------
    HoraError
        There are not so many devices.
    """
    sizes = tuple(axes.get(name, 1) for name in ("fsdp", "tp"))
    needed = math.prod(sizes)
    if needed > jax.device_count():
        raise HoraError(f"a mesh of {axes} needs {needed} devices, got {jax.device_count()}: make it smaller")
    return jax.make_mesh(sizes, ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:needed])


def shard_weights(tree: Any, mesh: Mesh) -> Any:
    """Weight matrices of an NNX state over both axes, the rest on every device."""

    def place(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        axes = ("tp", "fsdp") if any(name in ROWS_BY_TP for name in names) else ("fsdp", "tp")
        fits = leaf.ndim >= 2 and all(n % mesh.shape[a] == 0 for n, a in zip(leaf.shape[-2:], axes, strict=True))
        spec = PartitionSpec(*(None,) * (leaf.ndim - 2), *axes) if fits else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The same arrays on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(batch: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Rows of a batch over fsdp, on every device where they cannot be divided."""
    rows = next(iter(batch.values())).shape[0]
    spec = PartitionSpec("fsdp") if rows % mesh.shape["fsdp"] == 0 else PartitionSpec()
    return jax.device_put(batch, NamedSharding(mesh, spec))
