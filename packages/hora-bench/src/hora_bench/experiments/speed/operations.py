"""What a trained adapter can do on either backend, as functions that return when their work is done."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hora_bench.tasks.base import Batch

Run = Callable[[], Any]


def inference(learner: Any, batch: Batch) -> dict[str, Run]:
    """A forward pass ``"adapted"``, and ``"merged"`` where the method merges."""
    passes: dict[str, Run] = {"adapted": lambda: learner.outputs(batch)}
    if hasattr(learner, "accelerator"):
        passes |= _torch_merged(learner, batch)
    elif hasattr(learner.model, "merged"):
        passes |= _jax_merged(learner, batch)
    return passes


def operations(learner: Any, folder: str) -> dict[str, Run]:
    """Generating the factors of all layers, merging, and exporting or saving the adapter, as far as a method has them.

    Parameters
    ----------
    learner
        Of either backend.
    folder
        Where exports go.
    """
    if hasattr(learner, "accelerator"):
        return _torch_operations(learner.model, folder)
    return _jax_operations(learner.model, folder) if hasattr(learner.model, "merged") else {}


def _torch_merged(learner: Any, batch: Batch) -> dict[str, Run]:
    if not hasattr(learner.model, "merge_and_unload"):
        return {}
    import torch

    model = deepcopy(learner.model).merge_and_unload().eval()
    images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).to(learner.accelerator.device)

    def run() -> Any:
        with torch.no_grad():
            return model(images).cpu()

    return {"merged": run}


def _torch_operations(model: Any, folder: str) -> dict[str, Run]:
    if not hasattr(model, "merge_adapter"):
        return {}
    import torch
    from hora_torch import export_lora
    from hora_torch.functional import factors
    from hora_torch.hypernet import HoraHypernet

    def merge() -> None:
        model.merge_adapter()
        model.unmerge_adapter()

    hypernets = [module for module in model.modules() if isinstance(module, HoraHypernet)]
    if not hypernets:
        return {"merge and unmerge": merge, "save": _into(model.save_pretrained, folder)}

    def generate() -> None:
        with torch.no_grad():
            for hypernet in hypernets:
                factors(hypernet.spec, hypernet.layer, hypernet.params())

    return {
        "generate": generate,
        "merge and unmerge": merge,
        "save": _into(model.save_pretrained, folder),
        "export as LoRA": _into(lambda path: export_lora(model, path), folder),
    }


def _jax_merged(learner: Any, batch: Batch) -> dict[str, Run]:
    import jax
    from flax import nnx

    graph, state = nnx.split(learner.model.merged())
    run = jax.jit(lambda state, image: nnx.merge(graph, state)(image))
    return {"merged": lambda: jax.block_until_ready(run(state, batch["image"]))}


def _jax_operations(model: Any, folder: str) -> dict[str, Run]:
    import hora_jax
    import jax

    plan, phi = model.plan, model.adapter()
    generate = jax.jit(lambda phi: hora_jax.factors(plan, phi))
    return {
        "generate": lambda: jax.block_until_ready(generate(phi)),
        "merge": lambda: jax.block_until_ready(jax.tree.leaves(model.merged())),
        "save": _into(lambda path: hora_jax.save_adapter(path, plan, phi), folder),
        "export as LoRA": _into(lambda path: hora_jax.export_lora(plan, phi, path), folder),
    }


def _into(write: Callable[[Path], Any], folder: str) -> Run:
    """Write into a new directory each time: adapters do not overwrite what they did not write."""

    def run() -> None:
        with TemporaryDirectory(dir=folder) as empty:
            write(Path(empty))

    return run
