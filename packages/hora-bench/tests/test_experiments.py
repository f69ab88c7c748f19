import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hora_bench import methods, results
from hora_bench.experiments import ablate, sample_efficiency
from hora_bench.experiments.intervals import mean_interval, paired_interval
from hora_bench.experiments.journal import Journal
from hora_bench.experiments.sample_efficiency import plot as plot_curve
from hora_bench.experiments.setting import Setting, read_setting, request, vary
from hora_bench.experiments.similarity.plot import plot as plot_similarity
from hora_bench.experiments.similarity.run import similarity
from hora_bench.experiments.speed.run import speed
from hora_bench.tasks.image_sources import digits
from hora_spec import HoraError
from scipy import stats

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def setting(vit_directory, monkeypatch):
    """Two steps on forty digits."""

    def few(image_size):
        task = digits(image_size)
        parts = {part: getattr(task, part).take(np.arange(40)) for part in ("train", "val", "test")}
        return replace(task, **parts)

    monkeypatch.setattr("hora_bench.experiments.setting.digits", few)
    return Setting(request(model=str(vit_directory), image_size_px=32, steps=2, warmup_steps=1, batch_size=4), {})


def test_similarity_measures_every_layer_and_resumes(setting, tmp_path):
    journal, seen = tmp_path / "pieces.jsonl", []
    asked = {"methods": ["lora", "hora"], "journal": Journal(journal)}
    first = similarity(setting, **asked, progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 2), (2, 2)]
    assert len(first["layers"]) == 2 * 2 * 2
    assert {record["projection"] for record in first["layers"]} == {"q", "v"}
    hora = [record for record in first["summary"] if record["method"] == "hora"]
    assert all(0 < record["participation_ratio"] <= 8 for record in hora)
    assert similarity(setting, methods=asked["methods"], journal=Journal(journal)) == first
    for path in plot_similarity(first, tmp_path):
        assert path.read_text().startswith("<?xml")


def test_options_of_the_request_reach_the_methods_that_have_them(setting):
    tanh = Setting(vary(setting.base, activation="tanh"), {})
    changed, usual = (similarity(one, methods=["lora", "hora"])["summary"] for one in (tanh, setting))
    same = {(one["method"], one == other) for one, other in zip(changed, usual, strict=True)}
    assert same == {("lora", True), ("hora", False)}


def test_ablation_changes_one_factor_and_repeats_no_run(setting, tmp_path, monkeypatch):
    asked = {"factors": {"residual": [True]}, "learning_rates": [1e-3], "references": ["lora"]}
    first = ablate.ablate(setting, tmp_path, **asked)
    assert [(row["factor"], row["value"]) for row in first["rows"]] == [
        ("default", None),
        ("method", "lora"),
        ("residual", True),
        ("learning_rate", 1e-3),
    ]
    assert first["rows"][0]["over_default_pct"] == {"mean_pct": 0, "low_pct": None, "high_pct": None}
    assert all(row["low_pct"] <= row["mean_pct"] <= row["high_pct"] for row in first["rows"])
    assert [(row["backend"], row["method"]) for row in first["controls"]] == [("torch", "hora")]
    monkeypatch.setattr("hora_bench.runs.fit", lambda *_, **__: pytest.fail("trained again"))
    assert ablate.ablate(setting, tmp_path, **asked) == first


def test_ablation_gives_every_choice_its_own_rate_and_tests_it_once_per_seed(setting, tmp_path):
    found = ablate.ablate(
        setting,
        tmp_path,
        factors={"steps": [4]},
        variants={"wide-residual": {"residual": True, "hidden_dim": 80}, "long-lora": {"method": "lora", "steps": 4}},
        search=[1e-3, 1e-2],
        seeds=[0, 1],
        controls={},
    )
    rows = {row["value"]: row for row in found["rows"]}
    assert list(rows) == [None, "lora", 4, "wide-residual", "long-lora"]
    for value, row in rows.items():
        trials = [trial for trial in found["search"] if trial["value"] == value]
        assert [trial["learning_rate"] for trial in trials] == [1e-3, 1e-2]
        assert row["learning_rate"] == max(trials, key=lambda trial: trial["accuracy_pct"])["learning_rate"]
        assert len(row["accuracies_pct"]) == 2
    assert [rows[value]["steps"] for value in rows] == [2, 2, 4, 2, 4]
    for value, reference in {None: "lora", "wide-residual": "lora", 4: "long-lora"}.items():
        own, theirs = (np.array(rows[name]["accuracies_pct"]) for name in (value, reference))
        assert rows[value]["over_lora_pct"]["mean_pct"] == pytest.approx((own - theirs).mean(), abs=0.01)
    ablate.plot(found, tmp_path / "choices.svg")
    assert "difference from LoRA" in (tmp_path / "choices.svg").read_text()
    tested = [results.read(path).request for path in tmp_path.glob("*.json")]
    assert len(tested) == 2 * len(rows)
    assert {(asked.train_on, asked.score_on) for asked in tested} == {("train+val", "test")}
    assert {asked.options["hidden_dim"] for asked in tested if asked.method == "hora"} == {40, 80}


def test_sample_efficiency_tunes_on_validation_and_tests_with_every_seed(setting, tmp_path):
    found = sample_efficiency.sample_efficiency(
        setting, tmp_path, methods=["hora"], fractions=[0.5], learning_rates=[1e-3, 1e-2], seeds=[0, 1]
    )
    (point,) = found["curve"]
    best = max(found["search"], key=lambda trial: trial["accuracy_pct"])
    assert point["learning_rate"] == best["learning_rate"]
    assert len(point["accuracies_pct"]) == 2
    plot_curve(found, tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").stat().st_size > 1000


def test_shuffled_labels_keep_images_and_test_labels(setting):
    plain, shuffled = setting.load("digits"), setting.load("digits-shuffled")
    assert shuffled.name == "digits-shuffled"
    assert (plain.labels("test") == shuffled.labels("test")).all()
    assert sorted(plain.labels("train")) == sorted(shuffled.labels("train"))
    assert (plain.labels("train") != shuffled.labels("train")).mean() > 0.8


def test_a_limit_cuts_every_split_and_is_no_more_than_there_is(setting):
    for limit, size in ((30, 30), (50, 40)):
        task = Setting(vary(setting.base, limit=limit), {}).load("digits")
        assert {task.size(split) for split in ("train", "val", "test")} == {size}


def test_an_experiment_file_gives_request_and_what_varies(tmp_path):
    path = tmp_path / "one.toml"
    path.write_text('[request]\nsteps = 7\n[vary]\nmethods = ["hora"]\n')
    found = read_setting(path, quick=None, data=None)
    assert (found.base.steps, found.vary) == (7, {"methods": ["hora"]})
    path.write_text("[request]\nstep = 7\n")
    with pytest.raises(HoraError, match=r"got \['step'\] in one.toml"):
        read_setting(path, quick=None, data=None)
    assert read_setting(None, quick={"seeds": [3]}, data=None).vary == {"seeds": [3]}


COMMANDS = {
    "ablate": ablate.ablate,
    "defaults": ablate.ablate,
    "control": ablate.ablate,
    "sample-efficiency": sample_efficiency.sample_efficiency,
    "similarity": similarity,
    "speed": speed,
}


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_experiment_file_fits_its_command(path):
    found = read_setting(path, quick=None, data=None)
    (command,) = (command for name, command in COMMANDS.items() if path.stem.startswith(name))
    assert set(found.vary) <= set(inspect.signature(command).parameters)
    for method in (*found.vary.get("methods", ()), *found.vary.get("references", ())):
        asked = vary(found.base, method=method)
        assert methods.find(method).configured(asked.options)
    for changes in found.vary.get("variants", {}).values():
        assert vary(found.base, **changes) != found.base


@pytest.mark.parametrize(("path", "quick", "given"), [(None, None, "neither"), (Path("one.toml"), {}, "both")])
def test_an_experiment_takes_a_file_or_is_quick(path, quick, given):
    with pytest.raises(HoraError, match=f"--quick, got {given}"):
        read_setting(path, quick=quick, data=None)


def test_a_task_without_its_folder_says_what_to_pass(setting, tmp_path):
    with pytest.raises(HoraError, match="pass --data"):
        setting.load("sign_digits")
    with pytest.raises(HoraError, match="must hold sign_digits"):
        Setting(setting.base, {}, tmp_path).load("sign_digits")


def test_steps_scale_the_warm_up_and_methods_keep_what_makes_them():
    base = request(options={"rank": 4, "activation": "tanh", "residual": False}, steps=100, warmup_steps=10)
    assert vary(base, steps=400).warmup_steps == 40
    assert vary(base, hidden_dim=80).options == {**base.options, "hidden_dim": 80}
    assert vary(base, method="lora").options == {**methods.find("lora").options, "rank": 4}
    kept = {"rank": 4, "activation": "tanh"}
    assert vary(base, method="hora-residual").options == {**methods.find("hora-residual").options, **kept}
    with pytest.raises(HoraError, match="the options of lora are rank, alpha, got gain"):
        vary(base, method="lora", gain=1.0)


def test_a_varied_request_is_validated():
    assert vary(request(), seed=4).seed == 4
    with pytest.raises(ValueError, match="fraction"):
        vary(request(), fraction=2.0)


@pytest.mark.parametrize("accuracies", [[100.0], [0.0], [60.0, 70.0, 65.0]])
def test_intervals_hold_the_mean_and_stay_percentages(accuracies):
    found = mean_interval(accuracies, 200)
    assert 0 <= found["low_pct"] <= found["mean_pct"] <= found["high_pct"] <= 100
    assert mean_interval(accuracies, 20_000)["low_pct"] >= found["low_pct"]


def test_paired_intervals_leave_out_what_seeds_share():
    seeds = np.array([60.0, 80.0, 70.0])
    assert paired_interval(seeds + 1, seeds) == {"mean_pct": 1.0, "low_pct": 1.0, "high_pct": 1.0}
    found, expected = paired_interval([61.0, 83.0, 72.0], seeds), stats.ttest_rel([61.0, 83.0, 72.0], seeds)
    interval = expected.confidence_interval(0.95)
    assert (found["low_pct"], found["high_pct"]) == pytest.approx((interval.low, interval.high), abs=0.01)


def test_a_journal_drops_a_line_cut_by_a_kill(tmp_path):
    path = tmp_path / "pieces.jsonl"
    for key in "ab":
        Journal(path).once(key, lambda key=key: key.upper())
    path.write_text(path.read_text()[:-3])
    journal = Journal(path)
    assert journal.once("a", lambda: pytest.fail("forgotten")) == "A"
    assert journal.once("b", lambda: 2) == 2
    assert Journal(path).once("b", lambda: pytest.fail("forgotten")) == 2
    journal.remove()
    assert not path.exists()
