"""A run: from a request to a result file with its adapter and predictions, on either backend, resumable any time."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from hora_bench import backends, store
from hora_bench.cache import new_directory, one_at_a_time, remove_leftovers
from hora_bench.data.base import Judged, Score, Task
from hora_bench.data.prompts import prompts, responses
from hora_bench.models import load
from hora_bench.recipe import subset
from hora_bench.request import Inputs, Request, check_kind, name_of
from hora_bench.store import PREDICTIONS, RunResult, Scores, Trial
from hora_bench.training import EVERY_S, Checkpoint, DivergedError, Learner, fit, predict
from hora_bench.versions import machine

Progress = Callable[[str, int, int, float], None]
EVAL_BATCH = {"images": 50, "sentences": 50, "text": 32}
NEW_TOKENS = 32


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

    Notes
    -----
    Processes that want the same run at the same time wait for the first, and read what it left.
    """
    if request.last_blocks is not None:
        (found,) = results(request, [request.seed], task, out, command=command, trials=trials, progress=progress)
        if found is None:
            raise DivergedError(f"the loss must be finite, got none at rate {request.learning_rate:g}: lower it")
        return found
    check_kind(request, task.kind)
    inputs = Inputs.of(request, task)
    name = name_of(request, inputs)
    if found := finished(request, inputs, task, out, trials):
        return found
    store.check_writable(out)
    with one_at_a_time(out / name) if _processes(request.backend) == 1 else nullcontext():
        if found := finished(request, inputs, task, out, trials):  # by another process, meanwhile
            return found
        return _run(request, inputs, task, out, command=command, trials=trials, progress=progress, every_s=every_s)


def _processes(backend: str) -> int:
    """How many processes compute this run together; they must not wait for each other."""
    if backend == "jax":
        import jax

        return jax.process_count()
    return int(os.environ.get("WORLD_SIZE", "1"))


def _run(
    request: Request,
    inputs: Inputs,
    task: Task,
    out: Path,
    *,
    command: str,
    trials: Sequence[Trial],
    progress: Progress,
    every_s: float,
) -> RunResult:
    name = name_of(request, inputs)
    path, files = out / f"{name}.json", out / name
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
    watch.look()
    result = result_of(
        request,
        inputs,
        task,
        command=command,
        trials=trials,
        members=members,
        judged=judged,
        loss=curve.loss,
        counts=(learner.params_count, learner.total_params_count),
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


def finished(request: Request, inputs: Inputs, task: Task, out: Path, trials: Sequence[Trial]) -> RunResult | None:
    """What an earlier process left in `out`, if it did: its numbers, and the search that went before this time."""
    name = name_of(request, inputs)
    if not ((out / f"{name}.json").exists() and (out / name).is_dir()):
        return None
    found = store.read(out / f"{name}.json")
    if found.trials != list(trials):
        members = subset(task.labels(request.train_on), request.fraction, request.seed)
        labels = labels_count(request, task, members, trials)
        found = found.model_copy(update={"trials": list(trials), "labels_count": labels})
        found.write(out)
    return found


def result_of(
    request: Request,
    inputs: Inputs,
    task: Task,
    *,
    command: str,
    trials: Sequence[Trial],
    members: np.ndarray,
    judged: Sequence[Judged],
    loss: list[float],
    counts: tuple[int, int],
    files: dict[str, str],
    measured: store.Measured,
) -> RunResult:
    """The record of a run.

    Parameters
    ----------
    request, inputs, task, command, trials
        What was asked, of what, by whom, after which search.
    members, judged, loss
        Numbers of the training examples, every scored example, the loss of every step.
    counts
        Of trained values and of all.
    files, measured
        What was saved, and what the machine took for it.
    """
    unreadable = task.unreadable(request.train_on, members)
    unreadable |= task.unreadable(request.score_on, np.arange(task.size(request.score_on)))
    screened = {} if request.last_blocks is None else {"proxy": request.proxy}
    return RunResult(
        schema_version=store.SCHEMA_VERSION,
        command=command,
        request=request,
        inputs=inputs,
        data={**screened, **task.description()},
        weights=load.source(request.model),
        trained_params_count=counts[0],
        total_params_count=counts[1],
        train_count=len(members),
        labels_count=labels_count(request, task, members, trials),
        scores=Scores(**asdict(Score.of(judged))),
        loss=loss,
        unreadable_images=unreadable,
        trials=list(trials),
        files=files,
        measured=measured,
    )


def labels_count(request: Request, task: Task, members: np.ndarray, trials: Sequence[Trial]) -> int:
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


def results(
    request: Request,
    seeds: Sequence[int],
    task: Task,
    out: Path,
    *,
    command: str,
    trials: Sequence[Trial] = (),
    progress: Progress = silent,
) -> list[RunResult | None]:
    """The same request with several seeds: side by side where it is a screen, else one after the other.

    Parameters
    ----------
    request, task, out, command, trials, progress
        As for `run`.
    seeds
        In place of the request's.

    Returns
    -------
    list of RunResult or None
        One for each seed; None for one whose loss was not finite.
    """
    asked = [request.replace(seed=seed) for seed in seeds]
    if request.last_blocks is not None:
        from hora_bench.screen import screen

        return screen(asked, task, out, command=command, trials=trials, progress=progress)
    return [_unless_diverged(one, task, out, command=command, trials=trials, progress=progress) for one in asked]


def _unless_diverged(request: Request, task: Task, out: Path, **kept: Any) -> RunResult | None:
    with suppress(DivergedError):
        return run(request, task, out, **kept)
    return None
