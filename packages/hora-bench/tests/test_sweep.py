"""The engine of comparisons: every choice alike, paired, tuned with equal budget, controlled; files that fit it."""

import inspect
import json
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hora_bench import methods, store, sweep
from hora_bench.data.digits import digits
from hora_bench.data.images import Examples, ImageTask
from hora_bench.experiments.similarity.plot import plot as plot_similarity
from hora_bench.experiments.similarity.run import similarity
from hora_bench.experiments.speed.run import speed
from hora_bench.report.comparisons import plot
from hora_bench.report.rows import rows_of
from hora_bench.request import request, vary
from hora_bench.run import edge_of, run
from hora_bench.seeds import seeds_of
from hora_bench.stats import chance_bound
from hora_bench.store import Journal, Trial
from hora_bench.sweep import Setting, Sweep, control, read_setting
from hora_spec import HoraError

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
EVERYWHERE = [(method.name, backend) for method in methods.METHODS for backend in method.library]


@pytest.fixture
def setting(vit_directory, monkeypatch):
    """Two steps on forty digits."""

    def few(image_size, **settings):
        task = digits(image_size, **settings)
        parts = {part: getattr(task, part).take(np.arange(40)) for part in ("train", "val", "test")}
        return replace(task, **parts)

    monkeypatch.setattr("hora_bench.data.digits.digits", few)
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


def test_one_factor_is_changed_at_a_time_and_no_run_is_repeated(setting, tmp_path, monkeypatch):
    asked = Sweep(
        factors={"residual": [True]}, learning_rates=[1e-3], references=["lora"], controls={"torch": ["hora"]}
    )
    first = sweep.sweep(setting, tmp_path, asked)
    assert [(row["factor"], row["value"]) for row in first["rows"]] == [
        ("default", None),
        ("method", "lora"),
        ("residual", True),
        ("learning_rate", 1e-3),
    ]
    assert all(row["low_pct"] <= row["mean_pct"] <= row["high_pct"] for row in first["rows"])
    assert [(row["backend"], row["method"]) for row in first["controls"]] == [("torch", "hora")]
    monkeypatch.setattr("hora_bench.run.fit", lambda *_, **__: pytest.fail("trained again"))
    assert sweep.sweep(setting, tmp_path, asked) == first


def test_every_choice_finds_its_own_rate_and_is_tested_once_per_seed(setting, tmp_path):
    asked = Sweep(
        references=["lora"],
        variants={"wide-residual": {"residual": True, "hidden_dim": 80}, "long-lora": {"method": "lora", "steps": 4}},
        factors={"steps": [4]},
        search=[1e-3, 1e-2],
        seeds=[0, 1],
        search_seeds=[0, 1],
    )
    found = sweep.sweep(setting, tmp_path, asked)
    rows = {row["value"]: row for row in found["rows"]}
    assert list(rows) == [None, "lora", 4, "wide-residual", "long-lora"]
    for value, row in rows.items():
        trials = [trial for trial in found["search"] if trial["value"] == value]
        assert [(trial["learning_rate"], trial["seed"]) for trial in trials] == [
            (r, s) for r in (1e-3, 1e-2) for s in (0, 1)
        ]
        means = {
            rate: np.mean([t["accuracy_pct"] for t in trials if t["learning_rate"] == rate]) for rate in (1e-3, 1e-2)
        }
        assert row["learning_rate"] == max(means, key=means.get)
        assert row["rate_at_edge"] == ("lowest" if row["learning_rate"] == 1e-3 else "highest")
        assert row["labels_count"] == 80
        assert len(row["accuracies_pct"]) == 2
    for value, reference in {None: "lora", "wide-residual": "lora", 4: "long-lora"}.items():
        own, theirs = (np.array(rows[name]["accuracies_pct"]) for name in (value, reference))
        assert rows[value]["over_lora_pct"]["mean_pct"] == pytest.approx((own - theirs).mean(), abs=0.01)
    shown = rows_of(json.loads(json.dumps(found)))
    assert [row["over_lora"].mean for row in shown] == [row["over_lora_pct"]["mean_pct"] for row in found["rows"]]
    plot(found, tmp_path / "choices.svg")
    assert "difference from LoRA" in (tmp_path / "choices.svg").read_text()
    tested = [store.read(path).request for path in tmp_path.glob("*.json")]
    assert len(tested) == 2 * len(rows)
    assert {(asked.train_on, asked.score_on) for asked in tested} == {("train+val", "test")}


def test_a_curve_counts_the_labels_that_tuning_looked_at(setting, tmp_path):
    asked = Sweep.of({"methods": ["lora", "hora"], "fractions": [0.5, 1.0], "learning_rates": [1e-3], "seeds": [0]})
    found = sweep.sweep(setting, tmp_path, asked)
    assert [(row["value"], row["fraction"]) for row in found["rows"]] == [
        ("lora", 0.5),
        ("hora", 0.5),
        ("lora", 1.0),
        ("hora", 1.0),
    ]
    half, whole = found["rows"][0]["labels_count"], found["rows"][2]["labels_count"]
    assert 40 + 15 < half < whole == 80  # all of validation, and half of training
    plot(found, tmp_path / "curve.svg")
    assert "training data" in (tmp_path / "curve.svg").read_text()


@pytest.mark.parametrize(("best", "edge"), [(1e-3, "lowest"), (3e-3, None), (1e-2, "highest")])
def test_a_best_rate_at_the_edge_of_the_grid_is_noticed(best, edge):
    trials = [
        Trial(learning_rate=rate, weight_decay=0.0, accuracy_pct=1.0, final_loss=1.0, file=None)
        for rate in (1e-3, 3e-3, 1e-2)
    ]
    assert edge_of(trials, best) == edge
    assert edge_of(trials[:1], 1e-3) is None  # one rate is no search


def test_an_experiment_file_gives_request_and_what_varies(tmp_path):
    path = tmp_path / "one.toml"
    path.write_text('[request]\nsteps = 70\n[vary]\nmethods = ["hora"]\nseeds = "0-3"\n')
    found = read_setting(path, quick=None, data=None)
    assert (found.base.steps, Sweep.of(found.vary).seeds) == (70, (0, 1, 2, 3))
    assert read_setting(None, quick={"seeds": [3]}, data=None).vary == {"seeds": [3]}
    for text, message in (
        ("[request]\nstep = 7\n", r"got \['step'\] in one.toml"),
        ("[request", "is TOML, got"),
        ("[vary]\nmethod = 'hora'\n", "is varied is among methods, .*got method"),
    ):
        path.write_text(text)
        with pytest.raises(HoraError, match=message):
            Sweep.of(read_setting(path, quick=None, data=None).vary)


@pytest.mark.parametrize(
    ("given", "seeds"), [("0-3", (0, 1, 2, 3)), ("4", (4,)), ("0,2-3", (0, 2, 3)), ([5, 1], (5, 1))]
)
def test_seeds_are_lists_and_ranges(given, seeds):
    assert seeds_of(given) == seeds


@pytest.mark.parametrize("given", ["", "a", "-1", "3-", "1,1", "5-1", "1.5", [True]])
def test_seeds_that_are_none_are_refused(given):
    with pytest.raises(HoraError, match="write 0-19"):
        seeds_of(given)


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_experiment_file_fits_its_command(path):
    found = read_setting(path, quick=None, data=None)
    others = {"similarity": similarity, "speed": speed}
    own = next((run for name, run in others.items() if path.stem.startswith(name)), None)
    if own is not None:
        assert set(found.vary) <= set(inspect.signature(own).parameters)
        return
    asked = Sweep.of(found.vary)
    for method in (*asked.methods, *asked.references):
        assert methods.find(method).configured(vary(found.base, method=method).options)
    for changes in asked.variants.values():
        assert vary(found.base, **changes) != found.base


@pytest.mark.parametrize(("path", "quick", "given"), [(None, None, "neither"), (Path("one.toml"), {}, "both")])
def test_an_experiment_takes_a_file_or_is_quick(path, quick, given):
    with pytest.raises(HoraError, match=f"--quick, got {given}"):
        read_setting(path, quick=quick, data=None)


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


@pytest.fixture
def shades(vit_directory, monkeypatch):
    """Three classes of brightness, enough of them to validate on that the bound means something."""

    def made(image_size, **settings):
        rng = np.random.default_rng(0)

        def examples(count):
            classes = rng.permutation(np.arange(count) % 3)
            noise = rng.integers(0, 60, (count, 32, 32, 3)) + 80 * classes[:, None, None, None]
            return Examples(list(noise.astype(np.uint8)), classes)

        return ImageTask("digits", 3, examples(48), examples(240), examples(3), image_size=image_size)

    monkeypatch.setattr("hora_bench.data.digits.digits", made)
    base = request(model=str(vit_directory), image_size_px=32, learning_rate=1e-2, steps=12, warmup_steps=2)
    return Setting(base, {})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # qwix 0.1.8 calls what flax 0.12 deprecates
@pytest.mark.parametrize(("method", "backend"), EVERYWHERE)
def test_shuffled_labels_are_learned_by_no_method(method, backend, shades, tmp_path):
    task = shades.load("digits-shuffled")
    asked = vary(shades.base, method=method, backend=backend, task=task.name)
    accuracy = run(asked, task, tmp_path, command="test").scores.accuracy_pct
    assert accuracy <= chance_bound(task.labels("val")) < 50


def test_a_control_compares_with_true_labels(shades, tmp_path):
    (row,) = control(shades, tmp_path, {"torch": ["lora"]})
    assert row["at_chance"]
    assert row["shuffled_pct"] <= row["chance_bound_pct"] < row["accuracy_pct"]


def test_labels_that_leak_are_seen(shades, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageTask, "shuffled", lambda task: task)
    (row,) = control(shades, tmp_path, {"torch": ["lora"]})
    assert not row["at_chance"]


def test_the_experiment_names_every_method():
    controls = tomllib.loads((EXPERIMENTS / "control-digits.toml").read_text())["vary"]["controls"]
    named = [(method, backend) for backend, names in controls.items() for method in names]
    assert sorted(named) == sorted(EVERYWHERE)
