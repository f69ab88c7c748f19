"""A screen computes what it stands for: the last blocks of the whole model, each seed as if it were alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hora_bench import methods, run, screen, store
from hora_bench.backends import build
from hora_bench.recipe import subset
from hora_bench.request import request, vary
from hora_bench.training import fit
from hora_spec import HoraError

SETTING = {"image_size_px": 32, "batch_size": 8, "steps": 4, "warmup_steps": 1, "learning_rate": 1e-2}
TORCH = [method.name for method in methods.METHODS if "torch" in method.library]
TOLERANCE = 1e-4


def asked(model, **changes):
    return request(model=str(model), task="made", last_blocks=1, **{**SETTING, **changes})


def whole(one, task, *, adapted):
    """Losses of a run of the whole model, whose first block is adapted, and trained only where it is said."""
    full = one.replace(last_blocks=None)
    learner = build(full, task)
    for name, parameter in learner.model.named_parameters():
        if "blocks.0." in name and not adapted:
            parameter.requires_grad_(False)
    members = subset(task.labels(one.train_on), one.fraction, one.seed)
    return fit(learner, task, one.train_on, full.recipe, members=members, seed=one.seed).loss


@pytest.mark.parametrize("method", ["hora", "hora-residual", "mh-lora", "hora-joint", "linear-probe"])
def test_a_screen_is_the_whole_model_with_its_first_blocks_left_alone(method, vit_directory, image_task, tmp_path):
    one = asked(vit_directory, method=method, fraction=0.5, seed=3)
    (found,) = run.results(one, [3], image_task, tmp_path, command="test")
    np.testing.assert_allclose(found.loss, whole(one, image_task, adapted=False), atol=TOLERANCE)
    if method != "linear-probe":
        other = whole(one, image_task, adapted=True)
        assert abs(np.subtract(found.loss, other)).max() > 5 * TOLERANCE  # the comparison can fail


@pytest.mark.parametrize("method", TORCH)
def test_seeds_side_by_side_are_seeds_alone(method, vit_directory, image_task, tmp_path):
    rate = 1e-3 if method == "full" else 1e-2
    one = asked(vit_directory, method=method, learning_rate=rate, train_on="train+val", score_on="test")
    one = vary(one, rho=1.0) if method == "eva" else one  # else the data decide its sizes
    together = run.results(one, [0, 1, 2], image_task, tmp_path / "together", command="test")
    losses = np.array([result.loss for result in together])
    for seed, result in enumerate(together):
        (alone,) = run.results(one, [seed], image_task, tmp_path / f"{seed}", command="test")
        assert alone.name == result.name
        np.testing.assert_allclose(alone.loss, result.loss, atol=TOLERANCE)
        assert alone.scores.loss == pytest.approx(result.scores.loss, abs=10 * TOLERANCE)
        assert alone.trained_params_count == result.trained_params_count
    assert abs(losses[0] - losses[1]).max() > 10 * TOLERANCE


@pytest.mark.parametrize("method", ["hora-joint", "lora-ga"])
def test_a_method_that_starts_from_examples_starts_from_those_of_its_seed(method, vit_directory, image_task, tmp_path):
    one = vary(asked(vit_directory, method=method, learning_rate=0.1), start_batches=1)
    first, second = run.results(one, [0, 1], image_task, tmp_path, command="test")
    other = run.results(vary(one, start_batches=2), [0], image_task, tmp_path, command="test")[0]
    assert abs(np.subtract(first.loss, other.loss)).max() > TOLERANCE  # what it starts from matters
    assert first.loss != second.loss


def test_seeds_whose_sizes_the_data_decide_are_refused_side_by_side(vit_directory, image_task, tmp_path):
    stack = [torch.nn.Linear(2, size) for size in (2, 3)]
    with pytest.raises(HoraError, match="seeds side by side have equal sizes, got weight"):
        screen.Stack(stack, torch.device("cpu"))


def test_a_screen_says_that_it_is_a_proxy_and_is_not_repeated(vit_directory, image_task, tmp_path, monkeypatch):
    one = asked(vit_directory)
    first = run.results(one, [0, 1], image_task, tmp_path, command="test")
    for result in first:
        assert "a proxy: the last 1 blocks alone" in store.read(tmp_path / f"{result.name}.json").data["proxy"]
        rows = (tmp_path / result.name / "predictions.jsonl").read_text().splitlines()
        assert sum(json.loads(row)["right"] for row in rows) == result.scores.correct_count
    monkeypatch.setattr(screen, "Stack", lambda *_: pytest.fail("trained again"))
    assert run.results(one, [0, 1], image_task, tmp_path, command="test") == first
    assert run.run(one, image_task, tmp_path, command="test") == first[0]


def test_a_seed_that_diverges_leaves_the_others_as_they_are(vit_directory, image_task, tmp_path, monkeypatch):
    one = asked(vit_directory)
    kept = run.results(one, [1], image_task, tmp_path / "alone", command="test")[0]
    made = screen.model_of

    def broken(request, *given):
        model = made(request, *given)
        if request.seed == 0:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
        return model

    monkeypatch.setattr(screen, "model_of", broken)
    found = run.results(one, [0, 1], image_task, tmp_path / "both", command="test")
    assert found[0] is None
    np.testing.assert_allclose(found[1].loss, kept.loss, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "jax"}, "has backend torch, got jax"),
        ({"drop_path": 0.1}, "has drop_path 0.0, got 0.1"),
        ({"clip_norm": 1.0}, "has clip_norm None, got 1.0"),
        ({"dtype": "bfloat16"}, "has dtype float32, got bfloat16"),
        ({"image_size_px": None}, "is of a vision transformer, got text"),
    ],
)
def test_what_a_screen_would_do_otherwise_than_a_run_is_refused(changes, message, vit_directory):
    with pytest.raises(ValueError, match=message):
        asked(vit_directory, **changes)


def test_images_that_change_and_blocks_that_are_not_there_are_refused(vit_directory, image_task, tmp_path):
    with pytest.raises(HoraError, match="whose images change"):
        run.results(asked(vit_directory), [0], replace(image_task, augmentation="crop-flip"), tmp_path, command="")
    with pytest.raises(HoraError, match="got last_blocks 2 of 2"):
        run.results(asked(vit_directory).replace(last_blocks=2), [0], image_task, tmp_path, command="")
    assert torch.is_grad_enabled()
