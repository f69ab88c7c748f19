"""Corrupted and attacked images are what they are called, the trained model sees them, and what it keeps is judged."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hora_bench import screen
from hora_bench.data.images import Examples, ImageTask
from hora_bench.experiments.robustness import run as robustness_run
from hora_bench.experiments.robustness import scoring
from hora_bench.experiments.robustness.attacks import Attack, fgsm, pgd
from hora_bench.experiments.robustness.corruptions import CORRUPTIONS, corrupt
from hora_bench.experiments.robustness.measures import Group, answer_of, groups_of, rows_of
from hora_bench.experiments.robustness.plot import _multiples, plot
from hora_bench.experiments.robustness.run import Plan, robustness
from hora_bench.report.page import page_of, write_page
from hora_bench.report.tables import tables
from hora_bench.report.verdicts import verdicts
from hora_bench.request import request
from hora_bench.screen import Cached, tokens
from hora_bench.setting import Setting
from hora_bench.stats import Difference, kept, resampled, two_way_interval
from hora_bench.store import Journal, write_experiment
from hora_spec import HoraError
from torch.nn.functional import cross_entropy

STRENGTHS = {"noise": (10, 40), "blur": (0.7, 2), "contrast": (0.7, 0.3), "jpeg": (60, 5)}
KEYS = ("mean_pct", "low_pct", "high_pct")
ATTACK = Attack(epsilon=2, steps=2, images=6)
VARY = {
    "methods": ["lora", "hora"],
    "search": [1e-2, 2e-2, 4e-2],
    "search_seeds": [9],
    "seeds": [0, 1, 2],
    "corruptions": {"noise": [20], "contrast": [0.5]},
    "attack": {"epsilon": 2, "steps": 2, "images": 6},
    "images": 9,
}


def picture(seed=0):
    """A square on a slope, with some noise."""
    rng, image = np.random.default_rng(seed), np.mgrid[:28, :28].sum(0)[..., None] * np.array([2, 3, 1])
    image[8:18, 6:20] = 200
    return np.clip(image + rng.integers(0, 30, image.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def asked(vit_directory):
    base = {"model": str(vit_directory), "task": "made", "image_size_px": 32, "batch_size": 8, "warmup_steps": 1}
    return request(**base, steps=4, last_blocks=1, learning_rate=2e-2, method="lora", device="cpu")


@pytest.fixture
def setting(asked, image_task, monkeypatch):
    monkeypatch.setattr(Setting, "load", lambda *_: image_task)
    return Setting(asked.replace(steps=40), VARY)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_stronger_corruption_is_farther_from_the_image_and_none_changes_its_form(kind):
    clean = picture()
    found = [corrupt(clean, kind, strength) for strength in STRENGTHS[kind]]
    assert all((one.shape, one.dtype) == (clean.shape, clean.dtype) for one in found)
    weak, strong = (np.abs(one.astype(float) - clean).mean() for one in found)
    assert 0 < weak < 0.8 * strong
    np.testing.assert_array_equal(found[0], corrupt(clean, kind, STRENGTHS[kind][0]))


def test_noise_has_its_deviation_and_comes_from_the_pixels_alone():
    grey = np.full((64, 64, 3), 128, np.uint8)
    noise = corrupt(grey, "noise", 20).astype(float) - grey
    assert noise.std() == pytest.approx(20, rel=0.03)
    assert abs(noise.mean()) < 0.6
    other = corrupt(grey + np.uint8(1), "noise", 20).astype(float) - grey - 1
    assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.05


def test_contrast_is_the_share_kept_around_the_mean_grey():
    clean = picture()
    spread = [one.astype(float).std() for one in (clean, corrupt(clean, "contrast", 0.5))]
    assert spread[1] / spread[0] == pytest.approx(0.5, abs=0.1)


def test_a_changed_task_is_another_one_and_is_never_served_the_tokens_of_the_clean_one(asked, image_task):
    changed = image_task.changed("noise 20", partial(corrupt, kind="noise", strength=20))
    assert changed.name == "made-noise 20"
    for part in ("train", "val"):
        assert all(
            a is b for a, b in zip(getattr(changed, part).sources, getattr(image_task, part).sources, strict=True)
        )
    np.testing.assert_array_equal(changed.labels("test"), image_task.labels("test"))
    assert changed.fingerprint() != image_task.fingerprint()
    clean, dirty = (tokens(Cached.of(asked, task, "test")).hidden for task in (image_task, changed))
    assert (clean - dirty).abs().max() > 1e-2
    assert tokens(Cached.of(asked, image_task, "test")).hidden is clean  # which stays cached
    same = image_task.changed("nothing", lambda pixels: pixels)
    torch.testing.assert_close(tokens(Cached.of(asked, same, "test")).hidden, clean)


def test_every_condition_is_scored_on_its_own_images_of_all_classes(asked, image_task):
    seen = scoring.Seen.of(asked, image_task, {"noise": [20, 40], "contrast": [0.5]}, ATTACK, 9)
    assert [*seen.splits] == ["clean", "noise 20", "noise 40", "contrast 0.5"]
    hidden = [split.hidden for split in seen.splits.values()]
    assert all(len(one) == 9 for one in hidden)
    assert all((one - other).abs().max() > 1e-2 for i, one in enumerate(hidden) for other in hidden[:i])
    assert all(torch.equal(split.label, seen.splits["clean"].label) for split in seen.splits.values())
    assert torch.equal(seen.labels, seen.splits["clean"].label[seen.rows])
    assert sorted(np.unique(seen.labels, return_counts=True)[1]) == [2, 2, 2]


def test_images_are_changed_at_the_size_that_the_model_sees_and_unreadable_ones_stay_so(tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    examples = Examples([picture()] * 199, np.arange(199) % 2)
    test = Examples([picture(), bad], np.array([0, 1]))
    task = ImageTask("made", 2, examples, examples, test, image_size=14)
    seen = []
    changed = task.changed("seen", lambda pixels: seen.append(pixels.shape) or pixels)
    assert seen == [(14, 14, 3)]
    (batch,) = changed.eval_batches("test", 2)
    assert batch["weight"].tolist() == [1, 0]
    with pytest.raises(HoraError, match="images that are changed are seen whole, got made with crop-flip"):
        replace(task, augmentation="crop-flip").changed("seen", lambda pixels: pixels)


def linear(weight):
    """The loss of two classes whose logits are linear in pixels."""
    labels = torch.tensor([0, 1, 0, 1])
    return lambda images: cross_entropy(images.flatten(1) @ weight.T, labels, reduction="sum")


def test_on_a_linear_model_both_attacks_go_to_the_worst_corner_of_the_ball_and_no_pixel_leaves_it():
    generator = torch.Generator().manual_seed(0)
    weight, images = torch.randn(2, 27, generator=generator), torch.rand(4, 3, 3, 3, generator=generator)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None, None]
    worst = (images + 0.1 * sign * (weight[1] - weight[0]).sign().view(3, 3, 3)).clamp(0, 1)
    start = Attack(epsilon=1).start(tuple(images.shape))
    assert start.abs().max() <= 1
    torch.testing.assert_close(fgsm(linear(weight), images, 0.1), worst)
    torch.testing.assert_close(pgd(linear(weight), images, 0.1, steps=5, start=start), worst)
    once = pgd(linear(weight), images, 0.1, steps=1, start=torch.zeros_like(images))
    torch.testing.assert_close(once, worst)  # FGSM is one step without a random start
    still = pgd(lambda moved: 0 * moved.sum(), images, 0.1, steps=2, start=start)
    torch.testing.assert_close(still, (images + 0.1 * start).clamp(0, 1))


@pytest.fixture
def trained(asked, image_task):
    several = [asked.replace(seed=seed) for seed in range(2)]
    seen = scoring.Seen.of(asked, image_task, {}, ATTACK, 9)
    return SimpleNamespace(seen=seen, stack=screen.fitted(several, image_task).stack, view=image_task.view)


def test_the_whole_model_that_is_attacked_is_the_one_that_is_scored(trained, asked):
    whole = scoring.Whole(trained.stack, asked, trained.view)
    screened = trained.stack.score(trained.seen.splits["clean"].hidden[trained.seen.rows])
    with torch.no_grad():
        found = whole.logits(trained.seen.pixels.expand(2, *trained.seen.pixels.shape)).numpy()
    np.testing.assert_allclose(found, screened, atol=1e-4)
    assert abs(screened[0] - screened[1]).max() > 1e-3  # each seed its own
    scoring._check_alike(found, screened)
    with pytest.raises(HoraError, match="the whole model computes what its screen does"):
        scoring._check_alike(found + 0.1, screened)


def test_an_attack_stays_in_the_ball_and_in_valid_pixels_and_raises_the_loss_of_each_seed(trained, asked, monkeypatch):
    whole, seen, radius = scoring.Whole(trained.stack, asked, trained.view), trained.seen, 1 / 255
    images, labels = seen.pixels.expand(2, *seen.pixels.shape), seen.labels.repeat(2)

    def losses(moved):
        each = cross_entropy(whole.logits(moved).flatten(0, 1), labels, reduction="none")
        return each.view(2, -1)

    start = ATTACK.start(tuple(seen.pixels.shape))
    moves = (
        fgsm(lambda m: losses(m).sum(), images, radius),
        pgd(lambda m: losses(m).sum(), images, radius, steps=3, start=start),
    )
    for moved in moves:
        assert (moved - images).abs().max() <= radius * (1 + 1e-5)
        assert moved.min() >= 0
        assert moved.max() <= 1
        with torch.no_grad():
            assert (losses(moved).sum(1) > losses(images).sum(1)).all()
    assert not torch.equal(moves[0][0], moves[0][1])  # each seed has its own worst image
    monkeypatch.setattr(scoring, "SIDE_BY_SIDE", 8)  # four images of two seeds, then the other two
    together = scoring.attacks_of(whole, seen, ATTACK, 2)
    moves = (
        fgsm(lambda m: losses(m).sum(), images, 2 / 255),
        pgd(lambda m: losses(m).sum(), images, 2 / 255, steps=2, start=start),
    )
    for name, moved in zip(scoring.ATTACKS, moves, strict=True):
        with torch.no_grad():
            np.testing.assert_allclose(together[name], whole.logits(moved).numpy(), atol=1e-3)
    assert {name: found.shape for name, found in together.items()} == dict.fromkeys(
        (scoring.ATTACKED, *scoring.ATTACKS), (2, 6, 3)
    )


def test_shares_kept_have_the_ratio_of_means_as_their_mean_and_one_seed_near_chance_does_not_blow_them_up():
    rng = np.random.default_rng(0)
    clean, chance = rng.normal(60, 5, 16), 10.0
    changed = chance + 0.6 * (clean - chance) + rng.normal(0, 1, 16)
    found = kept(changed, clean, chance)
    assert np.mean(found) == pytest.approx(100 * (changed.mean() - chance) / (clean.mean() - chance))
    clean[0], changed[0] = chance + 0.01, chance + 2
    assert np.ptp(kept(changed, clean, chance)) < 30
    assert kept(changed, np.full(16, 19.0), chance) is None
    assert answer_of(group(0.15, {"a": 0.1}), group(0.15, {"a": 0.1}), margin=5.0, bounded=True)["kept_pct"] is None


def test_intervals_of_shares_kept_hold_the_truth_as_often_as_they_say():
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        clean = rng.normal(60, 8, (2, 16))
        changed = 10 + 0.6 * (clean - 10) + rng.normal(0, 3, (2, 16))
        over = Difference.of(*(kept(*pair, 10.0).tolist() for pair in zip(changed, clean, strict=True)))
        held += over.low <= 0 <= over.high
    assert 365 <= held <= 395  # 95 % of them are 380


def test_resampled_means_scatter_as_the_two_way_interval_says():
    right = np.random.default_rng(1).random((2, 12, 60)) < np.array([0.5, 0.7])[:, None, None]
    draws = 100 * resampled(right[1].astype(float) - right[0])
    _, low, high = two_way_interval(right[1], right[0])
    np.testing.assert_allclose(np.percentile(draws, [2.5, 97.5]), [low, high], atol=1.5)


def group(clean, changed, seeds=8, examples=200):
    """Of accuracies, with a scatter of seeds that is the same for all."""
    rows = (np.arange(examples) + 0.5) / examples
    shifts = np.linspace(-0.02, 0.02, seeds)[:, None]
    right = {name: (rows < share + shifts).astype(float) for name, share in {"clean": clean, **changed}.items()}
    return Group(right.pop("clean"), right, {}, 10.0)


@pytest.mark.parametrize(
    ("own", "word"),
    [((0.6, 0.5), "better"), ((0.6, 0.2), "worse"), ((0.9, 0.58), "equal"), ((0.15, 0.15), "not resolved")],
)
def test_who_is_more_accurate_on_clean_images_has_more_to_lose_and_is_judged_by_the_share_kept(own, word):
    lora, ours = group(0.6, {"a": 0.4, "b": 0.4}), group(own[0], {"a": own[1], "b": own[1]})
    said = answer_of(ours, lora, margin=5.0, bounded=True)
    assert said["word"] == word
    assert answer_of(ours, lora, margin=5.0, bounded=False)["word"] == "not resolved"  # a rate at the edge
    last = rows_of(ours, lora, "clean", "corruptions")[-1]
    assert last["condition"] == "mean of corruptions"
    assert last["kept_over_lora_pct"] == said["kept_over_lora_pct"]
    if word == "equal":
        assert last["lost_over_lora_pct"]["low_pct"] > 10
        assert said["kept_over_lora_pct"]["level"] == 0.975


def test_a_seed_that_diverged_counts_as_guessing_everywhere():
    names = ("clean", "noise 20", scoring.ATTACKED, *scoring.ATTACKS)
    outputs = np.zeros((2, 10, 2))
    outputs[..., 0] = 1
    outputs[1] = np.nan
    conditions = {name: scoring._condition(outputs, np.zeros(10, int)) for name in names}
    found = groups_of({"conditions": conditions, "diverged": [False, True]}, [60.0, 55.0])
    assert found["corruptions"].clean.mean(1).tolist() == pytest.approx([1.0, 0.6])
    assert found["attacks"].changed["pgd"].mean(1).tolist() == pytest.approx([1.0, 0.55])
    assert found["attacks"].loss["fgsm"] == pytest.approx(0.3133, abs=1e-4)


def test_robustness_is_measured_resumed_tabulated_drawn_and_judged(setting, tmp_path, monkeypatch):
    plan, journal = Plan.of(VARY), tmp_path / "pieces.jsonl"
    first = robustness(setting, tmp_path / "runs", plan, journal=Journal(journal))
    conditions = ["clean", "noise 20", "contrast 0.5", "mean of corruptions"]
    conditions += [scoring.ATTACKED, "fgsm", "pgd", "mean of attacks"]
    assert [row["condition"] for row in first["rows"]] == 2 * conditions
    assert [(one["value"], one["answer"]) for one in first["answers"] if "word" in one] == [
        ("hora", "corruptions"),
        ("hora", "attacks"),
    ]
    assert {(one["value"], one["seed"]) for one in first["search"]} == {("lora", 9), ("hora", 9)}
    assert any("a proxy" in note for note in first["notes"])
    assert len(first["rows"][0]["accuracies_pct"]) == 3
    monkeypatch.setattr(robustness_run, "scored", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(robustness_run.Seen, "of", lambda *_: pytest.fail("corrupted again"))
    assert robustness(setting, tmp_path / "runs", plan, journal=Journal(journal)) == first
    other = replace(plan, attack=ATTACK.model_copy(update={"epsilon": 3.0}))
    with pytest.raises(pytest.fail.Exception):  # another attack is another piece
        robustness(setting, tmp_path / "runs", other, journal=Journal(journal))
    found = tables("robustness", first)
    assert [len(one.rows) for one in found] == [4, 16]
    results = tmp_path / "results"
    results.mkdir()
    write_experiment(results / "robustness.json", "robustness", "test", seconds=1.0, result=first)
    pages = write_page(results, tmp_path / "page.md")
    before = {path: path.read_bytes() for path in pages}
    assert write_page(results, tmp_path / "page.md") == pages
    assert {path: path.read_bytes() for path in pages} == before
    assert "mean of corruptions" in (tmp_path / "page/robustness.md").read_text()
    content = {"experiment": "robustness", "result": first}
    said = [one for one in verdicts([(Path("r.json"), content)]) if one.claim.startswith("ours: more robust")]
    assert len(said) == 2
    assert all("a screen, a proxy" in one.why for one in said)
    assert all(one["kept_pct"] is not None for one in first["answers"])
    (drawn,) = plot(first, tmp_path)
    assert all(f">{condition}</text>" in drawn.read_text() for condition in conditions if "clean" not in condition)


def test_every_condition_of_every_choice_is_a_point_with_its_interval_in_the_plot_of_the_choice():
    rows = [
        {
            "factor": "variant",
            "value": name,
            "condition": condition,
            "kept_over_lora_pct": dict(zip(KEYS, of, strict=True)),
        }
        for name in ("joint", "default", "residual")
        for condition, of in (("noise 20", (1.0, 0.0, 2.0)), ("mean of corruptions", (-3.0, -5.0, None)))
    ]
    figure = _multiples(rows)
    assert [axis.get_title() for axis in figure.axes if axis.get_visible()] == ["joint", "default", "residual"]
    for axis in figure.axes[:3]:
        points = [one for one in axis.lines if len(one.get_xdata()) == 1 and one.get_marker() == "o"]
        assert [(one.get_xdata()[0], one.get_ydata()[0]) for one in points] == [(1.0, 0), (-3.0, 1)]
        assert [one.get_segments()[0].tolist() for one in axis.collections] == [[[0.0, 0.0], [2.0, 0.0]]]


@pytest.mark.parametrize(("shift", "word"), [(3.0, "confirmed"), (-3.0, "not seen"), (0.2, "not resolved")])
def test_comparisons_after_wrong_labels_are_of_the_page_on_robustness_and_have_a_verdict(shift, word):
    setting = {"task": "made", "fraction": 0.1, "seeds": [0, 1, 2], "last_blocks": 4}
    claim = "ours: more accurate than LoRA where labels are wrong"
    for task, page in (("made-wrong20", "robustness"), ("made", "comparisons")):
        which = {"task": task, "fraction": 0.1, "factor": "method"}
        lora, ours = [50.0, 51.0, 52.0], [50.5 + shift, 51.0 + shift, 51.5 + shift]
        rows = [
            {**which, "value": name, "accuracies_pct": found, "test_loss": 1.0, "learning_rate": 2, "params_count": 1}
            for name, found in (("lora", lora), ("joint", ours))
        ]
        for row, found in zip(rows, (lora, ours), strict=True):
            over = Difference.of(found, lora)
            row["over_lora_pct"] = {f"{name}_pct": getattr(over, name) for name in ("mean", "low", "high")}
        trials = [{**which, "value": row["value"], "learning_rate": rate} for row in rows for rate in (1, 2, 3)]
        content = {"experiment": "sweep", "result": {"setting": setting, "rows": rows, "search": trials}}
        assert page_of(content) == page
        found = [one for one in verdicts([(Path("r.json"), content)]) if one.claim == claim]
        assert [one.word for one in found] == [word if page == "robustness" else "not measured"]
