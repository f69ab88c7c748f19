"""A run: from a request to a result file with its adapter and predictions, on either backend, resumable any time."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from hora_spec import HoraError

from hora_bench import backends, store
from hora_bench.cache import new_directory, remove_leftovers
from hora_bench.data.base import Judged, Score, Task
from hora_bench.data.prompts import prompts, responses
from hora_bench.models import load
from hora_bench.recipe import subset
from hora_bench.request import Inputs, Request, name_of
from hora_bench.store import RunResult, Scores, Trial
from hora_bench.training import EVERY_S, Checkpoint, DivergedError, Learner, fit, predict
from hora_bench.versions import machine

Progress = Callable[[str, int, int, float], None]
EVAL_BATCH = {"images": 50, "text": 32}
NEW_TOKENS = 32
PREDICTIONS = "predictions.jsonl"


def silent(stage: str, done: int, total: int, loss: float) -> None:
    """No progress."""


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
    trials: Sequence[Trial] = (),
    progress: Progress = silent,
    every_s: float = EVERY_S,
) -> RunResult:
    """Train, score and save, or return the result of the same request on the same data, weights and code.

    Parameters
    ----------
    request, task
        What to run on which data.
    out
        Directory of result files; a folder of the result's name has the adapter and the predictions, and an unfinished
        run keeps its checkpoint beside.
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
        Nothing can be written to `out`, the loss is not a number, data is unreadable, or the request does not fit the
        backend.
    """
    inputs = Inputs.of(request, task)
    name = name_of(request, inputs)
    path, files = out / f"{name}.json", out / name
    if path.exists() and files.is_dir():
        return store.read(path)
    store.check_writable(out)
    members = subset(task.labels(request.train_on), request.fraction, request.seed)
    learner = backends.build(request, task)
    unfinished = out / f"{name}.checkpoint.safetensors"
    checkpoint = Checkpoint(learner, unfinished, every_s)
    watch = _Watch(learner)

    def stepped(done: int, total: int, loss: float) -> None:
        watch.look()
        progress("train", done, total, loss)

    curve = fit(
        learner,
        task,
        request.train_on,
        request.recipe,
        members=members,
        seed=request.seed,
        checkpoint=checkpoint,
        progress=stepped,
    )
    start = time.perf_counter()
    judged = _judged(learner, task, request, checkpoint, progress)
    score = Score.of(judged)
    watch.look()
    unreadable = task.unreadable(request.train_on, members)
    unreadable |= task.unreadable(request.score_on, np.arange(task.size(request.score_on)))
    result = RunResult(
        schema_version=store.SCHEMA_VERSION,
        command=command,
        request=request,
        inputs=inputs,
        data=task.description(),
        weights=load.source(request.model),
        trained_params_count=learner.params_count,
        total_params_count=learner.total_params_count,
        train_count=len(members),
        labels_count=_labels_count(request, task, members, trials),
        scores=Scores(**asdict(score)),
        loss=curve.loss,
        unreadable_images=unreadable,
        trials=list(trials),
        files=_save(learner, judged, files),
        measured=store.Measured(
            train_time_s=float(np.sum(curve.seconds)),
            step_time_s=curve.step_time_s,
            eval_time_s=time.perf_counter() - start,
            peak_memory_bytes=watch.peak,
            step_seconds=curve.seconds,
            machine=machine(),
        ),
    )
    if learner.is_main:
        result.write(out)
        unfinished.unlink(missing_ok=True)
        for file in (path, unfinished, files):
            remove_leftovers(file)
    return result


def _labels_count(request: Request, task: Task, members: np.ndarray, trials: Sequence[Trial]) -> int:
    """Labels that anything was learned or chosen from: of training, and of validation where rates were searched."""
    used = set(members.tolist())
    for seed in {trial.seed for trial in trials}:
        used |= set(subset(task.labels("train"), request.fraction, seed).tolist())
        used |= set(range(task.size("train"), task.size("train+val")))
    return len(used)


def _judged(learner: Learner, task: Any, request: Request, checkpoint: Checkpoint, progress: Progress) -> list[Judged]:
    """Every example of the split: by likelihood, and by what is written where answers are generated."""
    split = request.score_on

    def scored(rows: int, *, stage: str, total: int) -> None:
        progress(stage, min(rows, total), total, 0.0)

    count = partial(scored, stage="score", total=task.rows_count(split))
    batches = task.eval_batches(split, EVAL_BATCH[task.kind])
    outputs = predict(learner.outputs, batches, checkpoint=checkpoint, progress=count)
    if request.scoring != "generation":
        return task.judge(split, outputs)
    records = task.records(split)
    settings = {"end": task.tokenizer.eos_token_id, "new_tokens": NEW_TOKENS, "beams": request.beams}
    count = partial(scored, stage="write", total=len(records))
    passed = -(-task.rows_count(split) // EVAL_BATCH[task.kind])
    asked = prompts(task, records, NEW_TOKENS)
    written = predict(partial(learner.write, **settings), asked, checkpoint=checkpoint, skip=passed, progress=count)
    return task.judge(split, outputs, responses(task, records, written))


def _save(learner: Learner, judged: Sequence[Judged], directory: Path) -> dict[str, str]:
    """Write adapter and predictions, whole or not at all; what they are called and what they are."""
    saved = {"adapter": "", PREDICTIONS: "one example a line: answer, prediction and loss"}
    if learner.is_main:
        remove_leftovers(directory)
        with new_directory(directory) as temporary:
            (temporary / "adapter").mkdir()
            saved["adapter"] = learner.save(temporary / "adapter")
            store.write_lines(temporary / PREDICTIONS, map(asdict, judged))
    else:
        saved["adapter"] = learner.save(directory)  # gathers what the main process writes
    return saved


def tune(
    request: Request,
    task: Task,
    out: Path,
    *,
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    command: str,
    seeds: Sequence[int] | None = None,
    progress: Progress = silent,
) -> tuple[Request, list[Trial]]:
    """Choose learning rate and weight decay on the validation split; the same grid for every method.

    Parameters
    ----------
    request, task, out, command, progress
        As for `run`; trials are kept in the folder ``trials`` of `out`.
    learning_rates, weight_decays
        The grid.
    seeds
        A setting is judged by its mean accuracy over these; default the request's.

    Returns
    -------
    tuple
        The request with the best rates, to be trained on train and val together and tested once, and all trials.
        A setting that diverges with any seed counts as a trial without accuracy. Ties go to the lower rate.

    Raises
    ------
    HoraError
        Every setting diverged.
    """
    trials: list[Trial] = []
    for rate in sorted(learning_rates):
        for decay in sorted(weight_decays):
            for seed in [request.seed] if seeds is None else seeds:
                changes = {
                    "learning_rate": rate,
                    "weight_decay": decay,
                    "train_on": "train",
                    "score_on": "val",
                    "seed": seed,
                }
                asked = request.replace(**changes)
                trials.append(_trial(asked, task, out / "trials", command=command, progress=progress))
    means = {setting: found for setting in _settings(trials) if (found := _mean(trials, setting)) is not None}
    if not means:
        raise HoraError(f"one learning rate must converge, got none of {learning_rates}: pass lower ones to --tune-lr")
    rate, decay = max(means, key=lambda setting: means[setting])
    return request.replace(learning_rate=rate, weight_decay=decay), trials


def _trial(asked: Request, task: Task, out: Path, *, command: str, progress: Progress) -> Trial:
    setting = {"learning_rate": asked.learning_rate, "weight_decay": asked.weight_decay, "seed": asked.seed}
    stage = f"lr {asked.learning_rate:g} wd {asked.weight_decay:g}: "
    try:
        found = run(asked, task, out, command=command, progress=lambda kind, *rest: progress(stage + kind, *rest))
    except DivergedError:
        return Trial(**setting, accuracy_pct=None, final_loss=None, file=None)
    return Trial(
        **setting,
        accuracy_pct=found.scores.accuracy_pct,
        loss=found.scores.loss,
        final_loss=found.loss[-1],
        file=f"trials/{found.name}.json",
    )


def _settings(trials: Sequence[Trial]) -> list[tuple[float, float]]:
    return list(dict.fromkeys((trial.learning_rate, trial.weight_decay) for trial in trials))


def _mean(trials: Sequence[Trial], setting: tuple[float, float]) -> float | None:
    found = [trial.accuracy_pct for trial in trials if (trial.learning_rate, trial.weight_decay) == setting]
    reached = [accuracy for accuracy in found if accuracy is not None]
    return float(np.mean(reached)) if len(reached) == len(found) else None


def edge_of(trials: Sequence[Trial], rate: float) -> str | None:
    """``"lowest"`` or ``"highest"`` where the best rate is the last of the grid that way: a better may lie beyond."""
    rates = sorted({trial.learning_rate for trial in trials})
    if len(rates) < 2 or rate not in (rates[0], rates[-1]):
        return None
    return "lowest" if rate == rates[0] else "highest"
