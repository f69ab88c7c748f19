"""Timing: fair turns, every quantity of each backend, and the device that was asked for."""

from itertools import product

import numpy as np
import pytest
import torch
from hora_bench import backends
from hora_bench.experiments.speed.clock import ratio, take_turns
from hora_bench.experiments.speed.operations import inference
from hora_bench.experiments.speed.random_text import RandomText
from hora_bench.experiments.speed.run import speed
from hora_bench.experiments.speed.starts import starts
from hora_bench.request import request, vary
from hora_bench.setting import Setting
from hora_spec import HoraError

QWIX = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # qwix 0.1.8 calls what flax 0.12 deprecates


@pytest.fixture
def images(vit_directory):
    return Setting(request(model=str(vit_directory), image_size_px=32, batch_size=4), {})


@pytest.fixture
def text(llama_directory):
    return Setting(request(task="random-text", model=str(llama_directory), batch_size=2), {})


def test_contenders_take_turns_in_an_order_that_rotates():
    calls = []
    names = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = take_turns(names, 4, clock="cpu")
    assert "".join(calls) == "abcbcacababc"
    assert all(len(values) == 4 for values in seconds.values())


def test_ratios_are_taken_within_a_round():
    busy = np.array([1.0, 10.0, 1.0])
    assert ratio(2 * busy, busy) == {"ratio": 2.0, "low": 2.0, "high": 2.0}


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_the_peak_of_a_step_holds_weights_moments_gradients_and_what_backward_needs(backend, images):
    task = images.load("digits")
    batch = task.train_batch("train", np.arange(8), np.random.default_rng(0))
    half = {name: value[:4] for name, value in batch.items()}
    learners = {
        name: backends.build(vary(images.base, backend=backend, method=name), task) for name in ("full", "hora")
    }
    for learner in learners.values():
        learner.step(batch, 1e-3, 0)
    before = learners["full"].state()
    peaks = {name: learner.peak_bytes(batch) for name, learner in learners.items()}
    assert peaks == {name: learner.peak_bytes(batch) for name, learner in learners.items()}
    weights = 4 * learners["full"].params_count
    assert peaks["full"] > 3 * weights  # the first gradients are freed before the last are made
    assert weights < peaks["hora"] < peaks["full"]
    assert learners["hora"].peak_bytes(half) < peaks["hora"]
    after = learners["full"].state()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_speed_times_steps_inference_and_operations(images):
    found = speed(images, torch=["linear-probe", "lora", "hora"], jax=[], rounds=2)
    by_method = {record["method"]: record for record in found["steps"]}
    assert by_method["lora"]["over_lora"]["ratio"] == 1
    assert by_method["lora"]["peak_over_lora"] == 1
    assert by_method["linear-probe"]["peak_mib"] < by_method["hora"]["peak_mib"]
    assert [(r["method"], r["form"]) for r in found["inference"]] == [
        ("linear-probe", "adapted"),
        *((method, form) for method in ("lora", "hora") for form in ("adapted", "merged")),
    ]
    hora = [r["operation"] for r in found["operations"] if r["method"] == "hora"]
    assert hora == ["generate", "merge and unmerge", "save", "export as LoRA"]
    assert found["setting"]["device"] == "cpu"


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_start_is_timed_beside_steps_and_starts_again_each_time(backend, images):
    task = images.load("digits")
    batch = task.train_batch("train", np.arange(4), np.random.default_rng(0))
    asked = {name: vary(images.base, backend=backend, method=name) for name in ("hora", "hora-joint")}
    (found,) = starts(asked, task, batch, 2, "wall")
    assert (found["method"], found["batches_count"]) == ("hora-joint", 4)
    assert found["over_step"]["ratio"] > 4  # a pass forward and backward over each batch, at the very least


@QWIX
@pytest.mark.parametrize(("dtype", "methods"), [("float32", ["full", "lora", "hora"]), ("bfloat16", ["hora"])])
def test_language_models_are_timed_on_both_backends(dtype, methods, text):
    asked = Setting(vary(text.base, dtype=dtype), {})
    found = speed(asked, torch=methods, jax=methods, seq=12, rounds=1, device="cpu")
    assert [(r["backend"], r["method"]) for r in found["steps"]] == list(product(("torch", "jax"), methods))
    for record in found["steps"]:
        assert record["tokens_per_s"] * record["median_s"] == pytest.approx(2 * 12, rel=0.01)
        assert ("compile_s" in record) == (record["backend"] == "jax")
    merged = {(r["backend"], r["method"]): r for r in found["inference"] if r["form"] == "merged"}
    assert merged.keys() == {*product(("torch", "jax"), {*methods} - {"full"})} - {("jax", "lora")}  # qwix merges none
    assert all(("over_frozen" in record) == ("full" in methods) for record in merged.values())
    assert "Tokens are random" in found["notes"][-1]


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_merged_pass_gives_what_the_adapted_one_gives(backend, text):
    task = RandomText(12)
    batch = task.train_batch("train", np.arange(3), np.random.default_rng(0))
    learner = backends.build(vary(text.base, backend=backend), task)
    before = inference(learner, batch)["adapted"]()
    for step in range(3):
        learner.step(batch, 0.1, step)
    passes = inference(learner, batch)
    np.testing.assert_allclose(passes["merged"](), passes["adapted"](), rtol=1e-4)
    assert not np.allclose(passes["adapted"](), before, rtol=1e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_device_that_is_absent_is_an_error_not_a_silent_cpu(backend, text):
    with pytest.raises(HoraError, match=f"--device cuda needs .* got none for {backend}: .* pass --device cpu"):
        speed(text, **{"torch": [], "jax": [], backend: ["hora"]}, device="cuda")


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_device_is_chosen_for_both_frameworks(backend, text):
    learner = backends.build(vary(text.base, backend=backend, device="cpu"), RandomText(12))
    device = learner.accelerator.device.type if backend == "torch" else learner.device.platform
    assert device == "cpu"


@pytest.mark.parametrize(
    ("dtype", "changes", "message"),
    [("bfloat16", {}, "got bfloat16"), ("float32", {"clock": "cpu", "device": "cuda"}, "--cpu-clock with --device")],
)
def test_what_cannot_be_timed_is_refused(dtype, changes, message, images):
    with pytest.raises(HoraError, match=message):
        speed(Setting(vary(images.base, dtype=dtype), {}), torch=["hora"], jax=[], **changes)
