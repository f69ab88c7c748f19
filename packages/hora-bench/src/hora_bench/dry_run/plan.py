"""From counts to the memory of a device, and how both are printed."""

from dataclasses import dataclass
from math import prod
from typing import Any

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One optimiser step of a transformer: what it reads, and the widths that decide its activations.

    Attributes
    ----------
    batch_size, seq
        Sequences (or images) in a step, and their tokens (or patches).
    depth, embed, mlp, heads
        Of the transformer; `mlp` is the width that is kept twice (gate and up) or once in two forms (before and
        after GELU).
    outputs
        Logits of one sequence or image.
    """

    batch_size: int
    seq: int
    depth: int
    embed: int
    mlp: int
    heads: int
    outputs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What abstract weights tell exactly.

    Attributes
    ----------
    params_count, trained_count
        All parameters, and those that are trained.
    step_flops
        Floating-point operations of forward and backward on all devices together.
    counted_by
        Who counted them.
    """

    params_count: int
    trained_count: int
    step_flops: float
    counted_by: str


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device: frozen weights; trained weights with gradient and moments; what the backward pass keeps."""

    frozen_bytes: float
    trained_bytes: float
    activation_bytes: float

    @property
    def total_bytes(self) -> float:
        """The sum."""
        return self.frozen_bytes + self.trained_bytes + self.activation_bytes


def memory(counts: Counts, work: Workload, *, mesh: dict[str, int], itemsize: int) -> Memory:
    """An estimate of a device's memory.

    Frozen weights are divided by both axes of the mesh, batches by fsdp. Trained weights, gradient and two moments are
    float32 on every device. Activations are the residual stream of every layer and one layer's insides, as with
    recomputation.
    """
    fsdp, tp = (mesh.get(axis, 1) for axis in ("fsdp", "tp"))
    rows = work.batch_size / fsdp
    inside = 4 * work.embed + 2 * work.mlp / tp + 2 * work.heads * work.seq / tp
    kept = rows * work.seq * itemsize * (work.depth * work.embed + inside)
    frozen = (counts.params_count - counts.trained_count) * itemsize / (fsdp * tp)
    return Memory(frozen, 16 * counts.trained_count, kept + 4 * rows * work.outputs)


def show(console: Any, title: str, counts: Counts, work: Workload, *, mesh: dict[str, int], dtype: str) -> None:
    """Print counts and memory."""
    found = memory(counts, work, mesh=mesh, itemsize=2 if dtype == "bfloat16" else 4)
    devices, share = prod(mesh.values()), 100 * counts.trained_count / counts.params_count
    form = f"{devices} devices ({', '.join(f'{axis} {size}' for axis, size in mesh.items())})" if mesh else "1 device"
    console.print(f"[bold]{title}[/bold], {form}, {dtype}", highlight=False)
    console.print(f"parameters: {counts.params_count:,}, trained {counts.trained_count:,} ({share:.4f} %)")
    console.print(
        f"one step of {work.batch_size} x {work.seq} tokens: {counts.step_flops / 1e12:.2f} TFLOP, "
        f"{counts.step_flops / devices / 1e12:.2f} a device, counted by {counts.counted_by}"
    )
    console.print(f"memory per device: {found.total_bytes / GIB:.2f} GiB, of it")
    for part, size in (
        ("frozen weights", found.frozen_bytes),
        ("trained weights, gradient and moments", found.trained_bytes),
        ("activations, estimated, with recomputation", found.activation_bytes),
    ):
        console.print(f"  {part}: {size / GIB:.2f}")
