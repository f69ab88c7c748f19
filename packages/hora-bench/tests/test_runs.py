"""Runs: the same on both backends, resumed to the same file, searched with equal budget, recorded by a schema."""

import json
import multiprocessing
import re
import resource
import signal
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hora_bench import backends, methods, search, store
from hora_bench import run as runs
from hora_bench.cache import write_json
from hora_bench.data.records import TextTask, read_records, records_task
from hora_bench.models import load
from hora_bench.models.load import tokenizer
from hora_bench.recipe import Recipe, batch_indices, subset
from hora_bench.request import FINAL, Inputs, name_of
from hora_bench.request import request as made
from hora_bench.training import Checkpoint, fit
from hora_spec import HoraError
from safetensors.numpy import load_file

TOLERANCE = 1e-4
QWIX = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # qwix 0.1.8 calls what flax 0.12 deprecates


def request(model, **changes):
    settings = {"task": "made", "model": str(model), "image_size_px": 32, "learning_rate": 1e-2, "batch_size": 8}
    settings |= {"steps": 6, "warmup_steps": min(2, changes.get("steps", 6)), **FINAL, **changes}
    return made(**settings)


def stored(asked, task, out):
    return out / f"{name_of(asked, Inputs.of(asked, task))}.json"


def comparable(result):
    return {key: value for key, value in result.model_dump().items() if key != "measured"}


@pytest.mark.parametrize("method", ["hora", "hora-paper", "hora-joint", "mh-lora", "linear-probe", "full"])
def test_both_backends_agree_on_every_loss_and_score(method, vit_directory, image_task, tmp_path):
    torch, jax = (
        runs.run(request(vit_directory, method=method, backend=backend), image_task, tmp_path, command="test")
        for backend in ("torch", "jax")
    )
    np.testing.assert_allclose(jax.loss, torch.loss, atol=TOLERANCE if method != "full" else 1e-2)
    assert abs(jax.scores.correct_count - torch.scores.correct_count) <= 1
    assert jax.trained_params_count == torch.trained_params_count
    assert jax.total_params_count == torch.total_params_count


@QWIX
@pytest.mark.parametrize("method", [m.name for m in methods.METHODS if m.library.get("torch") == "peft"])
def test_peers_train_as_many_values_through_their_own_libraries(method, vit_directory, image_task, tmp_path):
    counts = set()
    for backend in methods.find(method).library:
        head, peer = (
            runs.run(
                request(vit_directory, method=name, backend=backend, steps=3), image_task, tmp_path, command="test"
            )
            for name in ("linear-probe", method)
        )
        assert np.isfinite(peer.loss).all()
        assert peer.loss[-1] != head.loss[-1]
        assert head.trained_params_count < peer.trained_params_count < peer.total_params_count
        counts.add(peer.trained_params_count)
    assert len(counts) == 1


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_joint_start_is_taken_from_the_first_batches_and_kept_in_the_checkpoint(backend, vit_directory, image_task):
    """A start that is computed again may differ in bits, or take close directions in another order."""
    asked = request(vit_directory, backend=backend, method="hora-joint")
    learner, again = (backends.build(asked, image_task) for _ in range(2))
    other = backends.build(asked.replace(options={**asked.options, "start_of": "inputs"}), image_task)
    one, another = ([np.asarray(value) for value in jax.tree.leaves(learner.fixed)] for learner in (learner, other))
    assert len(one) == len(another) > 0
    assert not any(map(np.array_equal, one, another))
    other.restore(learner.state())
    assert all(map(np.array_equal, one, map(np.asarray, jax.tree.leaves(other.fixed))))
    batch = image_task.train_batch("train", np.arange(8), np.random.default_rng(0))
    losses = [[one.step(batch, 1e-2, step) for step in range(3)] for one in (again, other)]
    np.testing.assert_array_equal(*losses)


def test_what_starts_from_examples_differs_from_what_does_not(vit_directory, image_task, tmp_path):
    """Losses after the first step, which all starts begin alike."""
    losses = {}
    for name, options in (
        ("lora", {}),
        ("eva", {}),
        ("lora-ga", {}),
        ("hora-a", {"a_source": "fixed"}),
        ("hora-joint", {}),
        ("hora-joint", {"start_scale": "rows"}),
        ("hora-joint", {"start_batches": 1}),
    ):
        asked = request(vit_directory, method=name, options=options)
        losses[name, *options] = runs.run(asked, image_task, tmp_path, command="test").loss
    assert len({loss[-1] for loss in losses.values()}) == len(losses)
    for name, loss in losses.items():
        assert loss[0] == pytest.approx(losses["lora",][0], rel=1e-5), name


def test_an_adapter_on_a_base_that_its_start_changed_is_not_saved_as_one_that_can_be_loaded(
    vit_directory, image_task, tmp_path
):
    result = runs.run(request(vit_directory, method="lora-ga", steps=1), image_task, tmp_path, command="test")
    assert "base" in result.files["adapter"]
    assert [file.name for file in (tmp_path / result.name / "adapter").iterdir()] == ["trained.safetensors"]


@pytest.mark.parametrize("scoring", ["log-likelihood", "generation"])
def test_language_models_agree_on_both_backends(scoring, llama_directory, records_file, tmp_path):
    task = records_task(records_file, tokenizer(str(llama_directory)), scoring=scoring)
    changes = {"image_size_px": None, "scoring": scoring, "batch_size": 4}
    torch, jax = (
        runs.run(request(llama_directory, backend=backend, **changes), task, tmp_path, command="test")
        for backend in ("torch", "jax")
    )
    np.testing.assert_allclose(jax.loss, torch.loss, atol=TOLERANCE)
    if scoring == "log-likelihood":
        assert abs(jax.scores.correct_count - torch.scores.correct_count) <= 1


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_weights_in_bfloat16_that_are_trained_go_on_where_they_were(backend, llama_directory, records_file, tmp_path):
    text = {"scoring": "log-likelihood"}
    task = records_task(records_file, tokenizer(str(llama_directory)), **text)
    asked = {"image_size_px": None, "batch_size": 4, "method": "full", "dtype": "bfloat16", "backend": backend}
    asked = request(llama_directory, **text, **asked)
    whole = runs.run(asked, task, tmp_path / "whole", command="test")

    def stop(stage, done, total, loss):
        if stage == "train" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.run(asked, task, tmp_path / "resumed", command="test", progress=stop, every_s=0.0)
    assert list((tmp_path / "resumed").glob("*.checkpoint.safetensors"))
    resumed = runs.run(asked, task, tmp_path / "resumed", command="test")
    assert comparable(resumed) == comparable(whole)


NEW = 8


def test_greedy_generation_with_a_cache_is_that_of_transformers(llama_directory):
    import torch
    from flax import nnx
    from hora_bench.backends.writing import greedy
    from hora_bench.data.prompts import left_padded

    theirs = load.causal_lm(str(llama_directory))
    tokens, valid = left_padded([[2, 3, 4], [5, 6, 7, 8, 2]], 0).values()
    settings = {"max_new_tokens": NEW, "do_sample": False}
    given = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(valid).long()}
    written = theirs.generate(**given, **settings).numpy()[:, tokens.shape[1] :]
    graph, params = nnx.split(load.nnx_llama(str(llama_directory)))
    ours = np.asarray(greedy(graph, params, nnx.State({}), tokens, valid, 0, new_tokens=NEW))
    np.testing.assert_array_equal(ours[:, : written.shape[1]], written)
    assert (ours[:, written.shape[1] :] == 0).all()


def test_an_adapter_writes_what_its_merged_model_writes(llama_directory):
    from flax import nnx
    from hora_bench.backends.jax_methods import prepare
    from hora_bench.backends.writing import greedy
    from hora_bench.data.prompts import left_padded

    adapted, _ = prepare(load.nnx_llama(str(llama_directory)), methods.find("hora"), seed=0)
    rng = np.random.default_rng(0)
    for params in adapted.phi.values():
        for value in params.values():
            value.set_value(jnp.asarray(rng.standard_normal(value.get_value().shape), jnp.float32))
    tokens, valid = left_padded([[2, 3, 4], [5, 6, 7, 8, 2]], 0).values()
    frozen, trained, merged = (
        np.asarray(greedy(*nnx.split(model), nnx.State({}), tokens, valid, 0, new_tokens=NEW))
        for model in (adapted.base, adapted, adapted.merged())
    )
    np.testing.assert_array_equal(trained, merged)
    assert not np.array_equal(trained, frozen)


@pytest.fixture
def processes(tmp_path, monkeypatch):
    """Processes that start in a moment, forked from one that has imported everything."""
    here = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(here)
    monkeypatch.setenv("PYTHONPATH", here)  # before Python 3.12.4 the process to fork from gets no sys.path
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["process_to_kill"])
    return context


@pytest.fixture
def start(processes, image_task):
    """Starts one, which trains on images and says when something happened."""
    from process_to_kill import train

    def start(asked, out, moment=0, at="", waits=False):
        here, there = processes.Pipe()
        process = processes.Process(target=train, args=(asked, image_task, out, moment, at, waits, there))
        process.start()
        there.close()  # so that reading fails if the process ends
        return process, here

    return start


@pytest.mark.parametrize("asked", [{"backend": "torch"}, {"backend": "jax"}, {"last_blocks": 1}], ids=str)
def test_processes_that_want_the_same_run_wait_for_the_first(asked, start, vit_directory, image_task, tmp_path):
    asked = request(vit_directory, steps=4, **asked)
    started = [start(asked, tmp_path, moment=1, at="step") for _ in range(3)]
    trained = 0
    for process, told in started:
        process.join()
        assert process.exitcode == 0
        with suppress(EOFError):
            trained += told.recv() == "step"
    assert trained == 1
    name = stored(asked, image_task, tmp_path).stem
    assert sorted(file.name for file in tmp_path.iterdir()) == [name, f"{name}.json"]


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_ten_kills_end_in_the_same_file(backend, start, vit_directory, image_task, tmp_path):
    asked = request(vit_directory, backend=backend, steps=24)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start(asked, whole)[0].join()
    rng, events, torn = np.random.default_rng(0), [], 0
    for kill in range(10):
        waits = kill % 2 == 0  # the others are killed wherever they are by then, in native code too
        at = {0: "step", 2: "os.chmod"}.get(kill % 5, "")  # a checkpoint that is written gets its mode last
        process, told = start(asked, killed, int(rng.integers(1, 16)), at=at, waits=waits)
        events.append(told.recv())
        time.sleep(0 if waits else rng.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not list(killed.glob("*.json"))
        torn += any(file.name.startswith(".") and not file.name.startswith(".lock.") for file in killed.iterdir())
    assert "step" in events
    assert torn  # some came while a checkpoint was written
    start(asked, killed)[0].join()
    name = stored(asked, image_task, killed).stem
    assert sorted(file.name for file in killed.iterdir()) == [name, f"{name}.json"]
    one, other = (store.read(out / f"{name}.json") for out in (whole, killed))
    assert comparable(one) == comparable(other)
    for file in (path for path in (whole / name).rglob("*") if path.is_file()):
        assert file.read_bytes() == (killed / file.relative_to(whole)).read_bytes()


@contextmanager
def disk_that_takes(size):
    """Files of this process end at `size` bytes, as on a disk that is full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_files_whole_or_absent(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, "whole")
    with disk_that_takes(1000):
        for name in ("result.json", "new.json"):
            with pytest.raises(HoraError, match=f"{name} needs room on its disk.*free some"):
                write_json(tmp_path / name, "x" * 10_000)
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    assert json.loads(path.read_text()) == "whole"


@pytest.mark.parametrize(
    ("filled", "every_s", "unwritten"),
    [("train", 0.0, "checkpoint"), ("train", 60.0, "checkpoint"), ("score", 60.0, "made-")],
)
def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    filled, every_s, unwritten, vit_directory, image_task, tmp_path
):
    asked, full, whole = request(vit_directory), tmp_path / "full", tmp_path / "whole"
    with ExitStack() as disk:

        def fill(stage, *counts):
            if stage == filled:
                disk.enter_context(disk_that_takes(1000))

        with pytest.raises(HoraError, match=f"{unwritten}.* needs room on its disk"):
            runs.run(asked, image_task, full, command="test", every_s=every_s, progress=fill)
    assert {file.suffix for file in full.iterdir()} == ({".safetensors"} if filled == "score" else set())
    one, other = (runs.run(asked, image_task, out, command="test", every_s=every_s) for out in (full, whole))
    assert comparable(one) == comparable(other)
    name = stored(asked, image_task, full).stem
    assert sorted(file.name for file in full.iterdir()) == [name, f"{name}.json"]


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_loss_that_is_no_number_stops_and_says_where(backend, vit_directory, image_task, tmp_path):
    learner = backends.build(request(vit_directory, backend=backend), image_task)
    recipe = Recipe(learning_rate=1e30, weight_decay=0.0, batch_size=8, steps=9, warmup_steps=2)
    path = tmp_path / "state.safetensors"
    checkpoint = Checkpoint(learner, path, every_s=0.0)
    with pytest.raises(HoraError, match=r"finite.*first in .*(head|blocks).*last good state.*lower the learning rate"):
        fit(learner, image_task, "train", recipe, members=np.arange(24), seed=0, checkpoint=checkpoint)
    kept = load_file(path)
    assert len(kept["curve.loss"])
    assert all(np.isfinite(value).all() for value in kept.values())


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_the_module_where_numbers_end_is_named(backend, vit_directory, image_task):
    learner = backends.build(request(vit_directory, backend=backend), image_task)
    batch = image_task.train_batch("train", np.arange(8), np.random.default_rng(0))
    assert learner.first_nonfinite(batch) == "all parameters and all modules' outputs are finite"
    if backend == "torch":
        learner.model.get_base_model().blocks[1].mlp.fc1.weight.data[0] = np.inf
    else:
        kernel = learner.frozen["base"]["blocks"][1]["mlp"]["fc1"]["kernel"]
        kernel.set_value(kernel.get_value().at[0].set(np.inf))
    assert re.fullmatch(
        r"first in the output of (base_model\.model\.)?blocks\.1\.mlp\.fc1", learner.first_nonfinite(batch)
    )
    before = learner.state()
    assert np.isnan(learner.step(batch, 1e-3, 0))
    after = learner.state()
    assert all(np.array_equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_batch_without_a_readable_image_teaches_nothing(backend, vit_directory, image_task):
    learner = backends.build(request(vit_directory, backend=backend, weight_decay=0.0), image_task)
    before = learner.state()
    batch = image_task.train_batch("train", np.arange(8), np.random.default_rng(0))
    assert learner.step(batch | {"weight": np.zeros(8, np.float32)}, 1e-3, 0) == 0
    after = learner.state()
    assert all(np.array_equal(after[name], value) for name, value in before.items() if value.ndim)


@pytest.mark.parametrize("scoring", ["log-likelihood", "generation"])
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_scoring_goes_on_where_it_was(backend, scoring, llama_directory, records_file, tmp_path, monkeypatch):
    monkeypatch.setattr("hora_bench.run.EVAL_BATCH", {"text": 4})
    monkeypatch.setattr("hora_bench.data.prompts.BATCH", 2)
    monkeypatch.setattr("hora_bench.run.NEW_TOKENS", NEW)
    records = [*read_records(records_file)] * 4
    task = TextTask("made", records[:8], records[:2], records[-8:], tokenizer(str(llama_directory)), scoring)
    asked = request(llama_directory, backend=backend, image_size_px=None, scoring=scoring, batch_size=4, steps=2)
    seen = []

    def stopped(stage, done, total, loss):
        seen.append((stage, done))
        if len(seen) == 6:
            raise KeyboardInterrupt

    whole = runs.run(asked, task, tmp_path / "whole", command="test", progress=lambda *event: seen.append(event[:2]))
    events = [*seen]
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        runs.run(asked, task, tmp_path / "stopped", command="test", progress=stopped, every_s=0.0)
    assert [stage for stage, _ in seen][:3] == ["train", "train", "score"]
    seen.clear()
    kept = []
    monkeypatch.setattr("hora_bench.training.Checkpoint.keep", lambda self: kept.append(len(self.rows)))
    resumed = runs.run(
        asked, task, tmp_path / "stopped", command="test", progress=lambda *event: seen.append(event[:2])
    )
    assert seen == events[2:]  # no step again
    assert kept[0] == 5  # and no batch again: the first to be scored is the fifth
    assert comparable(resumed) == comparable(whole)


def test_the_search_chooses_on_validation_with_equal_budget(vit_directory, image_task, tmp_path):
    asked = request(vit_directory, steps=3)
    best, trials = search.tune(asked, image_task, tmp_path, grid=[(1e-4, 0.0), (1e-2, 0.0)], command="test")
    assert [(trial.learning_rate, trial.weight_decay) for trial in trials] == [(1e-4, 0.0), (1e-2, 0.0)]
    assert best.learning_rate == max(trials, key=lambda trial: trial.accuracy_pct).learning_rate
    assert (best.train_on, best.score_on) == ("train+val", "test")
    files = [store.read(tmp_path / trial.file) for trial in trials]
    assert {(f.request.train_on, f.request.score_on) for f in files} == {("train", "val")}


def test_a_result_that_breaks_the_schema_is_refused_on_reading(vit_directory, image_task, tmp_path):
    result = runs.run(request(vit_directory, method="linear-probe", steps=1), image_task, tmp_path, command="test")
    path = tmp_path / f"{result.name}.json"
    assert store.read(path) == result
    content = json.loads(path.read_text())
    for change in ({"loss": "low"}, {"surprise": 1}, {"schema_version": 3}):
        path.write_text(json.dumps(content | change))
        with pytest.raises(HoraError, match=f"follow schema version 2.*at {next(iter(change))}"):
            store.read(path)


def test_data_order_depends_on_seed_and_step_alone():
    whole = np.concatenate([batch_indices(10, 4, step, 0) for step in range(5)])
    assert sorted(whole[:10]) == list(range(10)) == sorted(whole[10:])
    assert not np.array_equal(whole[:10], np.concatenate([batch_indices(10, 5, step, 1) for step in range(2)]))


def test_a_smaller_fraction_is_part_of_a_larger_one():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    small, large = (subset(labels, fraction, 0) for fraction in (0.1, 0.5))
    assert set(small) <= set(large)
    assert [int((labels[small] == c).sum()) for c in range(3)] == [5, 3, 2]
    assert len(subset(labels, 0.001, 0)) == 3
