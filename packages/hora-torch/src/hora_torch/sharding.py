"""Tensor parallelism: the part of a branch that belongs to the rows of this process (torch's DTensor)."""

from collections.abc import Sequence
from typing import Any

import torch
from hora_spec import HoraError
from torch import Tensor

from hora_torch.linear import Branch

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is distributed over processes."""
    return torch.distributed.is_available() and isinstance(tensor, DTensor)


def placed_like(value: Tensor, stored: Tensor) -> Tensor:
    """`value`, which every process has whole, in the placement of `stored`."""
    value = value.to(stored.device, stored.dtype)
    return distribute_tensor(value, stored.device_mesh, stored.placements) if is_sharded(stored) else value


def check_rows_alone(weight: Tensor, axis: int, module: str) -> None:
    """Raise unless a distributed `weight` is split along its output rows, which are `axis`, or not at all."""
    for placement in weight.placements:
        if not (placement.is_replicate() or placement.is_shard(axis)):
            raise HoraError(
                f"an adapted weight is sharded by its output rows (axis {axis}), got {placement} for {module!r}: leave "
                "it out of target_modules, or shard it column-wise (ColwiseParallel)"
            )


def of_this_process(
    x: Tensor, branches: Sequence[Branch], weight: Any, axis: int, columns: int
) -> tuple[Tensor, list[Branch]]:
    """Input and branches whose output columns are those of this process.

    Parameters
    ----------
    x
        (..., embed), the same in every process of the mesh.
    branches
        Of the whole weight.
    weight
        DTensor, sharded along `axis`, its output rows.
    columns
        Width of the base layer's output here; when that is the whole width, so is the branch.

    Returns
    -------
    x, branches
        With the values of this process's part; gradients are summed over all processes.
    """
    rows = weight.shape[axis]
    if columns == rows:
        return x, list(branches)
    if any(branch.stop - branch.start < rows for branch in branches):
        raise HoraError(
            "a fused weight is sharded by processes that gather its output, got local columns of several projections: "
            "use ColwiseParallel(output_layouts=Replicate()), or separate projections"
        )
    mesh, whole = weight.device_mesh, [Replicate()] * weight.device_mesh.ndim
    summed = [Partial() if placement.is_shard() else Replicate() for placement in weight.placements]
    placed = [Shard(0) if placement.is_shard() else Replicate() for placement in weight.placements]

    def shared(tensor: Tensor) -> Tensor:
        return DTensor.from_local(tensor, mesh, whole, run_check=False).to_local(grad_placements=summed)

    parts = []
    for a, b, scaling, _, _ in branches:
        b = DTensor.from_local(b, mesh, whole, run_check=False).redistribute(placements=placed).to_local()
        parts.append(Branch(shared(a), b, scaling, 0, b.shape[0]))
    return shared(x), parts


def part_of_weight(a: Tensor, b: Tensor, weight: Any, axis: int) -> tuple[Tensor, Tensor]:
    """Factors a (rank, embed), b (all rows, rank) of the part of a distributed `weight` that this process holds."""
    mesh, whole = weight.device_mesh, [Replicate()] * weight.device_mesh.ndim

    def part(tensor: Tensor, own: int, stored: int) -> Tensor:
        placed = [Shard(own) if placement.is_shard(stored) else Replicate() for placement in weight.placements]
        return DTensor.from_local(tensor, mesh, whole, run_check=False).redistribute(placements=placed).to_local()

    return part(a, 1, 1 - axis), part(b, 0, axis)
