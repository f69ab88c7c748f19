"""What a trained adapter can do on either backend, as functions that return when their work is done."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hora_bench.data.base import Batch

Run = Callable[[], Any]


def inference(learner: Any, batch: Batch) -> dict[str, Run]:
    """A forward pass ``"adapted"``, and ``"merged"`` where the method merges: the same pass, another model."""
    found = {"adapted": learner}
    if hasattr(learner.model, "merge_and_unload"):
        found["merged"] = _torch_merged(learner)
    elif hasattr(learner.model, "merged"):
        found["merged"] = _jax_merged(learner)
    return {form: partial(one.outputs, batch) for form, one in found.items()}


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


def _torch_merged(learner: Any) -> Any:
    from hora_bench.backends.torch import Logits

    merged = copy(learner)
    merged.logits = Logits(deepcopy(learner.model).merge_and_unload())
    return merged


def _jax_merged(learner: Any) -> Any:
    from flax import nnx

    merged = copy(learner)
    merged.graph, merged.params, merged.frozen = nnx.split(learner.model.merged(), lambda *_: False, ...)
    return merged


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
        wait()

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    hypernets = [module for module in model.modules() if isinstance(module, HoraHypernet)]
    if not hypernets:
        return {"merge and unmerge": merge, "save": _into(model.save_pretrained, folder)}

    def generate() -> None:
        with torch.no_grad():
            for hypernet in hypernets:
                factors(hypernet.spec, hypernet.layer, hypernet.params())
        wait()

    return {
        "generate": generate,
        "merge and unmerge": merge,
        "save": _into(model.save_pretrained, folder),
        "export as LoRA": _into(lambda path: export_lora(model, path), folder),
    }


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
