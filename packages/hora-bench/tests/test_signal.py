"""What heads have in common is found where it was planted, and only there; the model measured is the trained one."""

import numpy as np
import pytest
import torch
from hora_bench.backends import trained
from hora_bench.experiments.signal import run as signal_run
from hora_bench.experiments.signal.measures import (
    common_frame,
    energy,
    held,
    jackknife,
    measure,
    plain_frame,
    products,
    similarity,
    turned,
    unrelated,
)
from hora_bench.experiments.signal.plot import plot
from hora_bench.experiments.signal.run import signal
from hora_bench.report.tables import tables
from hora_bench.request import request, vary
from hora_bench.setting import Setting
from hora_bench.store import Journal
from scipy.stats import special_ortho_group

HEADS, HEAD_DIM, EMBED = 4, 6, 40


def noisy(signals, batches=200, noise=3.0):
    """Gradients of so many batches of the same signals."""
    return signals + noise * np.random.default_rng(9).normal(size=(batches, *signals.shape))


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_similarity_is_the_planted_one_and_noise_adds_nothing(shared):
    own, common = drawn(HEADS, HEAD_DIM, EMBED), drawn(HEAD_DIM, EMBED, seed=1)
    signals = np.sqrt(1 - shared) * own + np.sqrt(shared) * common
    frame = plain_frame(HEADS, HEAD_DIM)
    exact = similarity(np.einsum("hkd,gld->hgkl", signals, signals), frame)
    assert exact == pytest.approx(shared, abs=0.1)
    gradients = noisy(signals)
    assert similarity(products(gradients), frame) == pytest.approx(exact, abs=0.03)
    assert energy(gradients) == pytest.approx((signals**2).sum(), rel=0.05)
    alone = gradients.mean(0)
    naive = similarity(np.einsum("hkd,gld->hgkl", alone, alone), frame)
    assert shared == 0 or naive < exact - 0.02  # the same batches on both sides count noise as signal


def test_heads_turned_with_what_reads_them_are_alike_in_the_common_frame_alone():
    plain, by_chance = plain_frame(HEADS, HEAD_DIM), 0
    for seed in range(20):
        turns = special_ortho_group.rvs(HEAD_DIM, size=HEADS, random_state=seed)
        signals, maps = turns @ drawn(HEAD_DIM, EMBED, seed=100), turns @ drawn(HEAD_DIM, EMBED, seed=101)
        of, frame = products(noisy(signals, batches=50, noise=1.0)), common_frame(maps)
        assert similarity(of, frame) == pytest.approx(1, abs=0.05)
        (low, high), in_frame = unrelated([of], [(plain, frame)], seed=seed)
        assert low < 0 < high
        assert max(map(abs, in_frame)) < 0.6
        by_chance += low < similarity(of, plain) < high
    assert by_chance >= 17  # 95 % of them


def test_turns_favour_no_direction():
    same = np.tile(np.eye(HEAD_DIM), (HEADS, HEADS, 1, 1))
    rng = np.random.default_rng(0)
    turns = [turned(same, rng)[0, 1] for _ in range(2000)]
    np.testing.assert_allclose(np.mean(turns, axis=0), 0, atol=4 / np.sqrt(HEAD_DIM * 2000))


def test_directions_that_all_heads_read_are_held_by_one_basis_and_those_of_each_by_its_own():
    one, own = drawn(2, EMBED), drawn(HEADS, 2, EMBED, seed=1)
    written = drawn(HEADS, HEAD_DIM, 2, seed=2)
    common, each = (
        held({"q": noisy(written @ read, batches=40, noise=0.1)}, 2, np.arange(40) % 2 == 0)["q"] for read in (one, own)
    )
    assert min(common.values()) > 0.99
    assert each["own"] > 0.99
    assert each["one"] < 0.8


def test_leaving_out_one_at_a_time_gives_the_interval_of_a_mean():
    values = drawn(30)
    half = jackknife(lambda kept: values[kept].mean(keepdims=True), 30)
    assert half == pytest.approx(2.045 * values.std(ddof=1) / np.sqrt(30), rel=1e-3)


def test_the_interval_of_what_a_basis_holds_is_as_wide_as_repetitions_scatter():
    signals = drawn(HEADS, HEAD_DIM, 2, seed=2) @ drawn(HEADS, 2, EMBED, seed=1)

    def one(gradients, kept):
        return held({"q": gradients[kept]}, 2, kept % 2 == 0)["q"]["one"]

    repeated = [signals + np.random.default_rng(seed).normal(size=(8, *signals.shape)) for seed in range(40)]
    scatter = 2.365 * np.std([one(gradients, np.arange(8)) for gradients in repeated])
    halves = [jackknife(lambda kept, of=of: np.array(one(of, kept)), 8) for of in repeated[:20]]
    assert 0.6 * scatter < np.mean(halves) < 1.8 * scatter


def test_every_measure_has_a_name_and_a_number():
    gradients = {p: noisy(drawn(HEADS, HEAD_DIM, EMBED, seed=seed), batches=6) for seed, p in enumerate("qv")}
    frames = dict.fromkeys("qv", common_frame(drawn(HEADS, HEAD_DIM, EMBED)))
    found = measure(gradients, frames, 2, np.arange(6) % 2 == 0)
    assert found.keys() == {"q", "v"}
    assert all(np.isfinite(value) for numbers in found.values() for value in numbers.values())


@pytest.fixture
def setting(vit_directory, image_task, monkeypatch):
    monkeypatch.setattr(Setting, "load", lambda *_: image_task)
    base = {"model": str(vit_directory), "task": "made", "image_size_px": 32, "batch_size": 4, "warmup_steps": 1}
    return Setting(request(**base, steps=6, fraction=0.2, train_on="train+val", learning_rate=3e-2), {})


@pytest.mark.parametrize("method", ["linear-probe", "lora", "hora-residual", "mh-lora"])
def test_the_model_measured_is_the_trained_one(method, setting, image_task):
    asked = vary(setting.base, method=method)
    model, seen = signal_run._model(asked, image_task, at_start=False)
    learner, members, _ = trained(asked, image_task)
    batch = image_task.train_batch("train+val", np.arange(8), np.random.default_rng(0))
    images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)
    start, _ = signal_run._model(asked, image_task, at_start=True)
    with torch.no_grad():
        torch.testing.assert_close(model(images), learner.model.eval()(images), atol=1e-4, rtol=1e-4)
        assert (model(images) - start(images)).abs().max() > 1e-2
    assert sorted(seen) == sorted(members)


def test_signals_are_measured_resumed_tabulated_and_drawn(setting, tmp_path, monkeypatch):
    asked = {"methods": ["linear-probe"], "batches": 6, "rank": 2}
    journal = tmp_path / "pieces.jsonl"
    first = signal(setting, **asked, journal=Journal(journal))
    assert {one["state"] for one in first["summary"]} == {"start", "linear-probe"}
    assert len(first["layers"]) == 2 * 2 * 2
    monkeypatch.setattr(signal_run, "_measured", lambda *_: pytest.fail("measured again"))
    assert signal(setting, **asked, journal=Journal(journal)) == first
    (table,) = tables("signal", first)
    assert len(table.rows) == len(first["summary"])
    for path in plot(first, tmp_path):
        assert path.read_text().startswith("<?xml")
