"""What a run leaves behind, when it is taken as done, and what backends and peers have in common."""

import json
import shutil

import numpy as np
import pytest
from hora_bench import backends, store
from hora_bench import run as runs
from hora_bench.commands import experiments
from hora_bench.data.records import records_task
from hora_bench.models import load
from hora_bench.models.load import tokenizer
from hora_bench.recipe import Recipe, kept_paths
from hora_bench.request import FINAL, Inputs, name_of
from hora_bench.request import request as made
from hora_bench.store import Journal
from hora_bench.versions import sources_sha256
from hora_spec import HoraError, load_adapter
from safetensors.numpy import load_file

TOLERANCE = 1e-4
QWIX = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # qwix 0.1.8 calls what flax 0.12 deprecates


def request(model, **changes):
    settings = {"task": "made", "model": str(model), "image_size_px": 32, "learning_rate": 1e-2, "batch_size": 8}
    return made(**{**settings, "steps": 3, "warmup_steps": 1, **FINAL, **changes})


def predictions(result, out):
    return [json.loads(line) for line in (out / result.name / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_run_saves_an_adapter_that_predicts_what_was_scored(backend, vit_directory, image_task, tmp_path):
    import peft
    import torch

    result = runs.run(request(vit_directory, backend=backend), image_task, tmp_path, command="test")
    rows = predictions(result, tmp_path)
    assert result.files["adapter"] == "adapter of PEFT"
    assert [row["answer"] for row in rows] == [str(label) for label in image_task.labels("test")]
    assert sum(row["right"] for row in rows) == result.scores.correct_count
    assert np.mean([row["loss"] for row in rows]) == pytest.approx(result.scores.loss)
    base = load.timm_vit(str(vit_directory), 32, (np.zeros((64, 3), np.float32), np.zeros(3, np.float32)))
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / result.name / "adapter").eval()
    (batch,) = image_task.eval_batches("test", 12)
    with torch.no_grad():
        logits = adapted(torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)).numpy()
    judged = image_task.judge("test", logits)
    assert [one.predicted for one in judged] == [row["predicted"] for row in rows]
    np.testing.assert_allclose([one.loss for one in judged], [row["loss"] for row in rows], atol=TOLERANCE)


def test_both_backends_save_the_same_adapter(vit_directory, image_task, tmp_path):
    saved = []
    for backend in ("torch", "jax"):
        result = runs.run(request(vit_directory, backend=backend), image_task, tmp_path, command="test")
        saved.append(load_adapter(tmp_path / result.name / "adapter"))
    torch, jax = saved
    assert torch.layers.keys() == jax.layers.keys()
    for name, layer in torch.layers.items():
        for key, value in layer.params.items():
            np.testing.assert_allclose(jax.layers[name].params[key], value, atol=TOLERANCE)
    for name, value in torch.modules.items():
        np.testing.assert_allclose(jax.modules[name], value, atol=TOLERANCE)


def test_what_is_no_adapter_is_saved_by_its_names(vit_directory, image_task, tmp_path):
    asked = request(vit_directory, method="linear-probe")
    result = runs.run(asked, image_task, tmp_path, command="test")
    saved = load_file(tmp_path / result.name / "adapter/trained.safetensors")
    assert {name: value.shape for name, value in saved.items()} == {"head.weight": (3, 64), "head.bias": (3,)}


def test_answers_of_language_models_are_saved_with_their_loss(llama_directory, records_file, tmp_path):
    changes = {"image_size_px": None, "batch_size": 4, "steps": 1}
    losses = []
    for scoring, beams in (("log-likelihood", 1), ("generation", 1), ("generation", 2)):
        task = records_task(records_file, tokenizer(str(llama_directory)), scoring=scoring)
        asked = request(llama_directory, scoring=scoring, beams=beams, **changes)
        result = runs.run(asked, task, tmp_path, command="test")
        rows = predictions(result, tmp_path)
        assert [row["answer"] for row in rows] == [record.answer for record in task.test]
        losses.append([row["loss"] for row in rows])
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-5)  # however answers are judged


def test_another_image_other_weights_or_other_code_make_another_run(vit_directory, image_task, tmp_path, monkeypatch):
    weights = tmp_path / "weights"
    shutil.copytree(vit_directory, weights)
    asked = request(weights)

    def name():
        load_digests.cache_clear()
        return name_of(asked, Inputs.of(asked, image_task))

    from hora_bench.request import _digest_of as load_digests

    names = [name()]
    assert name() == names[0]
    image_task.train.sources[0][0, 0, 0] ^= 1
    image_task._fingerprint = ""
    names.append(name())
    content = bytearray((weights / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (weights / "model.safetensors").write_bytes(content)
    names.append(name())
    monkeypatch.setattr("hora_bench.request.code_sha256", lambda backend: "other")
    names.append(name())
    monkeypatch.setattr("hora_bench.request.versions", lambda: {"torch": "0"})
    names.append(name())
    assert len(set(names)) == len(names)


def test_a_digest_of_sources_sees_every_file(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/one.py").write_text("x = 1")
    found = [sources_sha256(tmp_path)]
    sources_sha256.cache_clear()
    (tmp_path / "deep/one.py").write_text("x = 2")
    assert sources_sha256(tmp_path) != found[0]


def test_pieces_of_an_experiment_that_other_code_measured_are_measured_again(tmp_path, monkeypatch):
    out = tmp_path / "signal.json"
    assert experiments._journal(out).once("piece", lambda: 1) == experiments._journal(out).once("piece", lambda: 2) == 1
    monkeypatch.setattr(experiments, "sources_sha256", lambda *_: "other")
    assert experiments._journal(out).once("piece", lambda: 3) == 3


def test_a_result_without_its_files_is_no_result(vit_directory, image_task, tmp_path):
    asked = request(vit_directory, method="linear-probe")
    first = runs.run(asked, image_task, tmp_path, command="one")
    shutil.rmtree(tmp_path / first.name)
    assert runs.run(asked, image_task, tmp_path, command="two").command == "two"
    assert (tmp_path / first.name / "predictions.jsonl").exists()


@pytest.mark.parametrize("last_blocks", [None, 1])
def test_a_finished_run_tells_the_search_of_the_one_who_asks(last_blocks, vit_directory, image_task, tmp_path):
    asked = request(vit_directory, method="linear-probe", fraction=0.2, last_blocks=last_blocks)
    first = runs.run(asked, image_task, tmp_path, command="test")
    trial = {"learning_rate": 1e-2, "weight_decay": 0.0, "accuracy_pct": 3.0, "final_loss": 1.0, "file": None}
    again = runs.run(asked, image_task, tmp_path, command="test", trials=[store.Trial(**trial)])
    assert (again.loss, len(again.trials)) == (first.loss, 1)
    assert again.labels_count > first.labels_count  # those of validation
    assert store.read(tmp_path / f"{first.name}.json") == again


def test_results_of_the_first_schema_are_read_with_their_values_untouched(tmp_path):
    asked = {
        "task": "commonsense",
        "model": "m",
        "method": "lora",
        "options": {"rank": 8, "alpha": None},
        "backend": "torch",
        "seed": 1,
        "fraction": 1.0,
        "limit": 200,
        "image_size_px": None,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "batch_size": 16,
        "steps": 10,
        "warmup_steps": 1,
        "train_on": "train+val",
        "score_on": "test",
        "scoring": "generation",
        "dtype": "float32",
        "mesh": None,
        "remat": False,
        "scan": False,
        "examples_sha256": "0",
    }
    trial = {"learning_rate": 1e-3, "weight_decay": 0.0, "accuracy_pct": 3.0, "final_loss": 1.0, "file": None}
    times = {"train_time_s": 1.0, "step_time_s": 1.0, "eval_time_s": 1.0, "peak_memory_bytes": 5, "step_seconds": [1.0]}
    old = {
        "schema_version": 1,
        "command": "hora-bench run commonsense",
        "request": asked,
        "data": {},
        "weights": {},
        "trained_params_count": 7,
        "total_params_count": 9,
        "scores": {"accuracy_pct": 50.0, "correct_count": 1, "total_count": 2, "groups_pct": {"boolq": 50.0}},
        "loss": [1.5],
        "unreadable_images": {},
        "trials": [trial],
        "measured": {**times, "machine": {}, "versions": {"torch": "2"}},
    }
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    found = store.read(path)
    assert (found.scores.accuracy_pct, found.loss, found.request.seed) == (50.0, [1.5], 1)
    assert (found.request.beams, found.request.schedule, found.scores.loss) == (4, "cosine", None)
    assert json.loads(path.read_text()) == old
    del old["scores"]
    path.write_text(json.dumps(old))
    with pytest.raises(HoraError, match=r"old\.json must follow schema version 2"):
        store.read(path)


@QWIX
def test_lora_starts_on_jax_as_peft_starts_it(vit_directory, image_task):
    found = {}
    for backend in ("torch", "jax"):
        learner = backends.build(request(vit_directory, method="lora", backend=backend), image_task)
        state = {name.lower(): value for name, value in learner.state().items()}
        if backend == "torch":
            a = [value for name, value in state.items() if "lora_a" in name]
            b = [value for name, value in state.items() if "lora_b" in name]
        else:
            from flax import nnx

            flat = [(path[-1], np.asarray(v.get_value())) for path, v in nnx.to_flat_state(learner.params)]
            a = [value for name, value in flat if str(name).endswith("lora_a")]
            b = [value for name, value in flat if str(name).endswith("lora_b")]
        assert len(a) == len(b) == 4
        assert not any(value.any() for value in b)
        found[backend] = np.concatenate([value.ravel() for value in a])
    bound = 1 / np.sqrt(64)
    for values in found.values():
        assert 0.95 * bound < np.abs(values).max() <= bound
        assert values.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)


@pytest.mark.parametrize("changes", [{"schedule": "linear", "clip_norm": 0.05}, {"drop_path": 0.5}])
def test_backends_agree_on_clipping_on_schedules_and_on_which_paths_are_dropped(
    changes, vit_directory, image_task, tmp_path
):
    plain, torch, jax = (
        runs.run(request(vit_directory, **asked), image_task, tmp_path, command="test")
        for asked in ({}, {**changes}, {"backend": "jax", **changes})
    )
    np.testing.assert_allclose(jax.loss, torch.loss, atol=TOLERANCE)
    assert abs(plain.loss[-1] - torch.loss[-1]) > 10 * TOLERANCE
    assert abs(jax.scores.loss - torch.scores.loss) < TOLERANCE  # nothing is dropped in scoring


def test_paths_are_kept_with_their_probability_and_keep_the_mean():
    kept = kept_paths(5, 4000, 0.4, seed=0, step=3)
    assert kept.shape == (4000, 5, 2)
    np.testing.assert_allclose((kept > 0).mean((0, 2)), [1, 0.9, 0.8, 0.7, 0.6], atol=0.02)
    np.testing.assert_allclose(kept.mean((0, 2)), 1, atol=0.03)
    assert (kept_paths(5, 4000, 0.4, seed=0, step=3) == kept).all()
    assert (kept_paths(5, 4000, 0.4, seed=0, step=4) != kept).any()


@pytest.mark.parametrize(("schedule", "half"), [("cosine", 0.5), ("linear", 0.5)])
def test_rates_warm_up_and_decay_to_zero(schedule, half):
    recipe = Recipe(learning_rate=1.0, weight_decay=0.0, batch_size=1, steps=110, warmup_steps=10, schedule=schedule)
    assert [recipe.rate(step) for step in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert recipe.rate(60) == pytest.approx(half)
    assert recipe.rate(35) == pytest.approx(0.75 if schedule == "linear" else (1 + np.cos(np.pi / 4)) / 2)
    assert recipe.rate(110) == pytest.approx(0.0, abs=1e-12)


def test_image_models_train_in_bfloat16_by_autocast_on_torch(vit_directory, image_task, tmp_path):
    full, half = (
        runs.run(request(vit_directory, dtype=dtype), image_task, tmp_path, command="test")
        for dtype in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(half.loss, full.loss, rtol=0.1)
    assert half.loss != full.loss


def test_a_journal_drops_a_line_cut_by_a_kill_and_pieces_of_other_code(tmp_path):
    path = tmp_path / "pieces.jsonl"
    for key in "ab":
        Journal(path, "code").once(key, lambda key=key: key.upper())
    path.write_text(path.read_text()[:-3])
    journal = Journal(path, "code")
    assert journal.once("a", lambda: pytest.fail("forgotten")) == "A"
    assert journal.once("b", lambda: 2) == 2
    assert Journal(path, "code").once("b", lambda: pytest.fail("forgotten")) == 2
    assert Journal(path, "other code").once("a", lambda: "new") == "new"
    journal.remove()
    assert not path.exists()
