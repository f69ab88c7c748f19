"""Learners on torch and JAX: the same steps from the same start."""

from typing import Any

import numpy as np
from hora_spec import HoraError

from hora_bench import methods
from hora_bench.data.base import Batch
from hora_bench.models import load
from hora_bench.recipe import head_init, subset
from hora_bench.request import Request
from hora_bench.training import Curve, Learner, batch_of, fit


def build(request: Request, task: Any) -> Learner:
    """A learner: pretrained model, method and optimiser of the request's backend.

    Raises
    ------
    HoraError
        The backend does not reach the device, or lacks the method, or the model does not fit.
    """
    if request.last_blocks is not None:
        raise HoraError(f"a screen is for runs and sweeps, got last_blocks {request.last_blocks}: leave it out")
    check_device(request.backend, request.device)
    method = methods.find(request.method).configured(request.options)
    head, size = None, request.image_size_px or 224
    if task.kind != "text":
        head = head_init(load.num_features(request.model, task.kind), task.num_classes, request.seed)
    if request.backend == "torch":
        import torch

        from hora_bench.backends.torch import TorchLearner, make_accelerator, placed, start_loss
        from hora_bench.backends.torch_methods import prepare

        if task.kind == "images":
            base = load.timm_vit(request.model, size, head, drop_path=request.drop_path)
        elif head is not None:
            base = load.sentence_classifier(request.model, head)
        else:
            base = load.causal_lm(request.model, dtype=request.dtype)
        half = torch.bfloat16 if head is not None and request.dtype == "bfloat16" else None
        accelerator, loss = make_accelerator(request.device), start_loss(half)
        examples = [placed(batch, accelerator.device) for batch in start_batches(request, task, method)]
        if examples:
            base.to(accelerator.device)
        prepared = prepare(base, method, seed=request.seed, examples=examples, loss=loss)
        return TorchLearner(prepared, request.recipe, accelerator=accelerator, autocast=half)
    import jax

    from hora_bench.backends.jax import JaxLearner
    from hora_bench.backends.jax_methods import prepare as prepare_jax

    form = {"scan_layers": request.scan, "remat": request.remat}
    device = None if request.device == "auto" else jax.devices(request.device)[0]
    # a model for a mesh waits in the host's memory: no device has to hold all of it
    with jax.default_device(jax.devices("cpu")[0] if request.mesh else device):
        if task.kind == "images":
            base = load.nnx_vit(request.model, size, head, **form)
        else:
            base = load.nnx_llama(request.model, dtype=request.dtype, **form)
        prepared = prepare_jax(base, method, seed=request.seed, examples=start_batches(request, task, method))
    return JaxLearner(*prepared, request.recipe, mesh=request.mesh, device=device)


def trained(request: Request, task: Any) -> tuple[Learner, np.ndarray, Curve]:
    """A learner after its training, the numbers of the examples that it saw, and what was measured."""
    learner = build(request, task)
    members = subset(task.labels(request.train_on), request.fraction, request.seed)
    return learner, members, fit(learner, task, request.train_on, request.recipe, members=members, seed=request.seed)


def start_batches(request: Request, task: Any, method: methods.Method) -> list[Batch]:
    """The first batches of training, from which a method starts that starts from examples; none for others."""
    if not (count := method.start.get("batches", 0)):
        return []
    members = subset(task.labels(request.train_on), request.fraction, request.seed)
    asked = task, request.train_on, members, request.batch_size, request.seed
    return [batch_of(*asked, step) for step in range(count)]


def check_device(backend: str, device: str) -> None:
    """Raise HoraError where a backend does not reach a device: nothing runs on another one silently."""
    if not reaches(backend, device):
        raise HoraError(
            f"--device {device} needs a {device} device that the backend reaches, got none for {backend}: install its "
            "build for it, or pass --device cpu"
        )


def reaches(backend: str, device: str) -> bool:
    """Whether a backend has such a device."""
    if device == "auto":
        return True
    if backend == "torch":
        import torch

        return device == "cpu" or torch.cuda.is_available()
    import jax

    try:
        return bool(jax.devices(device))
    except RuntimeError:
        return False
