"""A run: from a request to a result file, on either backend, resumable at any moment."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from hora_spec import HoraError

from hora_bench import methods, results
from hora_bench.cache import remove_leftovers
from hora_bench.models import load
from hora_bench.results import Request, RunResult, Scores, Trial
from hora_bench.tasks.base import Score, Task
from hora_bench.training.checkpoint import EVERY_S, Checkpoint, Curve
from hora_bench.training.learner import Learner
from hora_bench.training.loop import fit, predict
from hora_bench.training.recipe import Recipe, head_init, subset

Progress = Callable[[str, int, int, float], None]
EVAL_BATCH = {"images": 50, "text": 32}


def silent(stage: str, done: int, total: int, loss: float) -> None:
    """No progress."""


def recipe_of(request: Request) -> Recipe:
    """The part of a request that the optimiser sees."""
    names = ("learning_rate", "weight_decay", "batch_size", "steps", "warmup_steps")
    return Recipe(**{name: getattr(request, name) for name in names})


def build(request: Request, task: Any) -> Learner:
    """A learner: pretrained model, method and optimiser of the request's backend."""
    method = methods.find(request.method).configured(request.options)
    recipe = recipe_of(request)
    head, size = None, request.image_size_px or 224
    if task.kind == "images":
        head = head_init(load.num_features(request.model), task.num_classes, request.seed)
    if request.backend == "torch":
        import torch
        from accelerate import Accelerator

        from hora_bench.methods.torch import prepare
        from hora_bench.training.torch import TorchLearner

        if task.kind == "images":
            base = load.timm_vit(request.model, size, head)
        else:
            base = load.causal_lm(request.model, dtype=request.dtype)
        # without saying so, several processes on CPUs would not know of each other
        accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        return TorchLearner(prepare(base, method, seed=request.seed), recipe, accelerator=accelerator)
    import jax

    from hora_bench.methods.jax import prepare as prepare_jax
    from hora_bench.training.jax import JaxLearner

    form = {"scan_layers": request.scan, "remat": request.remat}
    # a model for a mesh waits in the host's memory: no device has to hold all of it
    with jax.default_device(jax.devices("cpu")[0] if request.mesh else None):
        if task.kind == "images":
            base = load.nnx_vit(request.model, size, head, **form)
        else:
            base = load.nnx_llama(request.model, dtype=request.dtype, **form)
        prepared = prepare_jax(base, method, seed=request.seed)
    return JaxLearner(*prepared, recipe, mesh=request.mesh)


@dataclass(slots=True)
class _Watch:
    """Largest memory of a run: the accelerator's own figure, on CPU the resident size seen between steps."""

    learner: Learner
    peak: int = 0

    def look(self) -> None:
        now = self.learner.device_peak_bytes() or psutil.Process().memory_info().rss
        self.peak = max(self.peak, now)


def run(
    request: Request,
    task: Task,
    out: Path,
    *,
    command: str,
    trials: list[Trial] | None = None,
    progress: Progress = silent,
    every_s: float = EVERY_S,
) -> RunResult:
    """Train and score, or return the result that is already there.

    Parameters
    ----------
    request, task
        What to run on which data.
    out
        Directory of result files; an unfinished run keeps its checkpoint beside.
    command
        The command line, for the file.
    trials
        The search that led to the request's rates.
    progress
        Called with a stage, steps or rows done, their total and the last loss.
    every_s
        Seconds between checkpoints.

    Raises
    ------
    HoraError
        The loss is not a number, data is unreadable, or the request does not fit the backend.
    """
    path = out / f"{request.name}.json"
    if path.exists():
        return results.read(path)
    members = subset(task.labels(request.train_on), request.fraction, request.seed)
    learner = build(request, task)
    unfinished = out / f"{request.name}.checkpoint.safetensors"
    checkpoint = Checkpoint(learner, unfinished, every_s)
    watch = _Watch(learner)

    def stepped(done: int, total: int, loss: float) -> None:
        watch.look()
        progress("train", done, total, loss)

    curve = fit(
        learner,
        task,
        request.train_on,
        recipe_of(request),
        members=members,
        seed=request.seed,
        checkpoint=checkpoint,
        progress=stepped,
    )
    start = time.perf_counter()
    score = _score(learner, task, request, checkpoint, progress)
    watch.look()
    eval_s = time.perf_counter() - start
    unreadable = task.unreadable(request.train_on, members)
    unreadable |= task.unreadable(request.score_on, np.arange(task.size(request.score_on)))
    result = _result(request, task, learner, curve, score, watch.peak, eval_s, unreadable, command, trials)
    if learner.is_main:
        result.write(out)
        unfinished.unlink(missing_ok=True)
        for file in (path, unfinished):
            remove_leftovers(file)
    return result


def _score(learner: Learner, task: Any, request: Request, checkpoint: Checkpoint, progress: Progress) -> Score:
    split = request.score_on
    generated = request.scoring == "generation"
    total = task.size(split) if generated else task.rows_count(split)

    def scored(rows: int) -> None:
        progress("score", min(rows, total), total, 0.0)

    if not generated:
        batches = task.eval_batches(split, EVAL_BATCH[task.kind])
        return task.score(split, predict(learner.outputs, batches, checkpoint=checkpoint, progress=scored))
    from hora_bench import generation

    records = task.records(split)
    write = partial(generation.write, learner, task.tokenizer.eos_token_id)
    written = predict(write, generation.prompts(task, records), checkpoint=checkpoint, progress=scored)
    return task.score_generated(split, generation.responses(task, records, written))


def _result(
    request: Request,
    task: Any,
    learner: Learner,
    curve: Curve,
    score: Score,
    peak: int,
    eval_s: float,
    unreadable: dict[str, str],
    command: str,
    trials: list[Trial] | None,
) -> RunResult:
    return RunResult(
        schema_version=results.SCHEMA_VERSION,
        command=command,
        request=request,
        data=task.description(),
        weights=load.source(request.model),
        trained_params_count=learner.params_count,
        total_params_count=learner.total_params_count,
        scores=Scores(
            accuracy_pct=score.accuracy_pct,
            correct_count=score.correct_count,
            total_count=score.total_count,
            groups_pct=score.groups_pct,
        ),
        loss=curve.loss,
        unreadable_images=unreadable,
        trials=trials or [],
        measured=results.Measured(
            train_time_s=float(np.sum(curve.seconds)),
            step_time_s=curve.step_time_s,
            eval_time_s=eval_s,
            peak_memory_bytes=peak,
            step_seconds=curve.seconds,
            **results.environment(),
        ),
    )


def tune(
    request: Request,
    task: Task,
    out: Path,
    *,
    learning_rates: tuple[float, ...],
    weight_decays: tuple[float, ...],
    command: str,
    progress: Progress = silent,
) -> tuple[Request, list[Trial]]:
    """Choose learning rate and weight decay on the validation split; the same grid for every method.

    Returns
    -------
    tuple
        The request with the best rates, to be trained on train and val together and tested once, and all trials.
        A setting that diverges counts as a trial without accuracy. Ties go to the lower rate.

    Raises
    ------
    HoraError
        Every setting diverged.
    """
    trials: list[Trial] = []
    for rate in sorted(learning_rates):
        for decay in sorted(weight_decays):
            changes = {"learning_rate": rate, "weight_decay": decay, "train_on": "train", "score_on": "val"}
            trial = request.model_copy(update=changes)
            stage = f"lr {rate:g} wd {decay:g}: "
            setting = {"learning_rate": rate, "weight_decay": decay}
            try:
                found = run(
                    trial,
                    task,
                    out / "trials",
                    command=command,
                    progress=lambda kind, done, total, loss, stage=stage: progress(stage + kind, done, total, loss),
                )
            except HoraError as error:
                if "loss must be finite" not in str(error):
                    raise
                trials.append(Trial(**setting, accuracy_pct=None, final_loss=None, file=None))
                continue
            name = f"trials/{trial.name}.json"
            accuracy, last = found.scores.accuracy_pct, found.loss[-1]
            trials.append(Trial(**setting, accuracy_pct=accuracy, final_loss=last, file=name))
    finished = [trial for trial in trials if trial.accuracy_pct is not None]
    if not finished:
        raise HoraError(f"one learning rate must converge, got none of {learning_rates}: pass lower ones to --tune-lr")
    best = max(finished, key=lambda trial: trial.accuracy_pct)
    rates = {"learning_rate": best.learning_rate, "weight_decay": best.weight_decay}
    return request.model_copy(update=rates), trials
