"""One fine-tuning of a frozen vision transformer: what the experiments repeat with one thing changed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from hora_spec import Factors

from hora_bench.methods import find
from hora_bench.tasks.image_sources import digits, image_folder
from hora_bench.tasks.images import ImageTask
from hora_bench.training.loop import evaluate, fit
from hora_bench.training.recipe import Recipe, head_init, subset

RANDOM: Final = "random"
EVAL_BATCH: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Everything that decides a run on torch; equal trials give equal results.

    Attributes
    ----------
    task
        ``"digits"``, or a folder or archive in the layout of VTAB-1K.
    model
        As `hora_bench.models.load.timm_vit`, or ``"random"``: four narrow layers without pretraining, for tests.
    image_size
        Pixels.
    method, options
        Name, and the options that differ from its defaults.
    learning_rate, weight_decay, batch_size, steps
        AdamW, a tenth of the steps to warm up, then cosine.
    fraction
        Of the training examples.
    seed
        Of initial values, subset and data order.
    final
        False: learn from the training split and score on validation. True: learn from both, score on test.
    shuffled
        Control: training labels permuted; accuracy should be chance.
    """

    task: str = "digits"
    model: str = RANDOM
    image_size: int = 56
    method: str = "hora"
    options: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    batch_size: int = 16
    steps: int = 200
    fraction: float = 1.0
    seed: int = 0
    final: bool = False
    shuffled: bool = False

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def key(self) -> dict[str, Any]:
        """All fields as JSON values; of the task its name alone, wherever it lies."""
        return {**asdict(self), "task": Path(self.task).name.split(".")[0], "options": dict(self.options)}

    @property
    def recipe(self) -> Recipe:
        """Optimiser and schedule."""
        return Recipe(
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
            steps=self.steps,
            warmup_steps=max(1, self.steps // 10),
        )


def load_task(trial: Trial) -> ImageTask:
    """The task's images, labels permuted if asked."""
    known = trial.task == "digits"
    task = digits(trial.image_size) if known else image_folder(Path(trial.task), trial.image_size)
    if not trial.shuffled:
        return task
    order = np.random.default_rng([trial.seed, 5])
    parts = {name: replace(part, classes=order.permutation(part.classes)) for name, part in _learned(task).items()}
    return replace(task, **parts)


def train(trial: Trial) -> tuple[dict[str, Any], Any]:
    """Fine-tune, then score.

    Returns
    -------
    dict
        ``accuracy_pct``, ``split``, ``loss`` (mean of the last ten steps), ``params_count`` (head included),
        ``step_time_s`` and ``time_s``.
    model
        The trained model.
    """
    from accelerate import Accelerator

    from hora_bench.methods.torch import prepare
    from hora_bench.training.torch import TorchLearner

    task = load_task(trial)
    start = time.perf_counter()
    method = find(trial.method).configured(dict(trial.options))
    model = prepare(build(trial, task.num_classes), method, seed=trial.seed)
    learner = TorchLearner(model, trial.recipe, accelerator=Accelerator(cpu=True))
    split, judged = ("train+val", "test") if trial.final else ("train", "val")
    members = subset(task.labels(split), trial.fraction, trial.seed)
    curve = fit(learner, task, split, trial.recipe, members=members, seed=trial.seed)
    score = evaluate(learner, task, judged, EVAL_BATCH)
    outcome = {
        "accuracy_pct": round(score.accuracy_pct, 3),
        "split": judged,
        "loss": round(float(np.mean(curve.loss[-10:])), 5),
        "params_count": learner.params_count,
        "step_time_s": round(curve.step_time_s, 4),
        "time_s": round(time.perf_counter() - start, 1),
    }
    return outcome, model


def build(trial: Trial, num_classes: int) -> Any:
    """The frozen vision transformer with a new head."""
    from hora_bench.models.load import num_features, timm_vit

    if trial.model != RANDOM:
        head = head_init(num_features(trial.model), num_classes, trial.seed)
        return timm_vit(trial.model, trial.image_size, head)
    from hora_bench.torchvision_ops import declare_missing_ops

    declare_missing_ops()
    import timm
    import torch

    torch.manual_seed(0)
    sizes = {"img_size": trial.image_size, "patch_size": 14, "embed_dim": 48, "depth": 4, "num_heads": 4}
    return timm.models.vision_transformer.VisionTransformer(**sizes, num_classes=num_classes).eval()


def factors(model: Any) -> dict[tuple[int, str], Factors]:
    """Factors of every layer and projection of a model adapted by hora-torch or by PEFT's LoRA.

    Returns
    -------
    dict
        ``(layer, "q" or "v")`` to ``Factors(a, b)`` in float32; rows of B are split into heads.
    """
    import torch
    from hora_torch.hypernet import HoraHypernet
    from peft.tuners.lora import LoraLayer

    found, heads = {}, model.get_base_model().blocks[0].attn.num_heads
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, HoraHypernet):
                generated = {p: module(p) for p in module.layer}
            elif isinstance(module, LoraLayer):
                b = module.lora_B["default"].weight
                generated = {
                    name.rpartition(".")[2]: Factors(module.lora_A["default"].weight, b.unflatten(0, (heads, -1)))
                }
            else:
                continue
            layer = int(name.partition("blocks.")[2].partition(".")[0])
            for projection, (a, b) in generated.items():
                found[layer, projection] = Factors(a.numpy().copy(), b.numpy().copy())
    return found


def _learned(task: ImageTask) -> dict[str, Any]:
    return {"train": task.train, "val": task.val}
