"""The engine of comparisons: every choice alike, paired, tuned with equal budget."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hora_bench import methods, store, sweep
from hora_bench.choices import Sweep
from hora_bench.data.digits import digits
from hora_bench.experiments.similarity.plot import plot as plot_similarity
from hora_bench.experiments.similarity.run import similarity
from hora_bench.report.comparisons import plot
from hora_bench.report.rows import rows_of
from hora_bench.report.tables import tables
from hora_bench.report.verdicts import verdicts
from hora_bench.request import request, seeds_of, vary
from hora_bench.search import Grid
from hora_bench.setting import Setting
from hora_bench.stats import level_of_looks
from hora_bench.store import Journal
from hora_spec import HoraError


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
        search=Grid.of([1e-3, 1e-2]),
        seeds=[2, 3],
        search_seeds=[0, 1],
    )
    found = sweep.sweep(replace(setting, base=vary(setting.base, last_blocks=1)), tmp_path, asked)
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
    plot(found, tmp_path, stem="choices")
    assert "difference from LoRA" in (tmp_path / "choices.svg").read_text()
    tested = [store.read(path).request for path in tmp_path.glob("*.json")]
    assert len(tested) == 2 * len(rows)
    assert {(asked.train_on, asked.score_on) for asked in tested} == {("train+val", "test")}


@pytest.fixture
def scored(monkeypatch, setting):
    """Runs whose accuracy is made up: by method, rank, rate and seed; what was asked for."""
    seen = []
    made = {"accuracy": lambda asked: 50.0, "examples": 100}

    def results(asked, seeds, task, out, *, command, trials=(), progress=None):
        found = []
        for seed in seeds:
            one = asked.replace(seed=seed)
            seen.append(one)
            accuracy = made["accuracy"](one)
            scores = None if accuracy is None else SimpleNamespace(accuracy_pct=accuracy, loss=1.0, total_count=1000)
            name = f"{asked.method}-{seed}-{asked.learning_rate}"
            if accuracy is not None and made["examples"]:
                rows = ({"right": bool(place < accuracy)} for place in range(made["examples"]))
                store.write_lines(out / name / "predictions.jsonl", rows)
            result = SimpleNamespace(
                scores=scores,
                request=one,
                loss=[1.0],
                trained_params_count=1,
                labels_count=2,
                name=name,
            )
            found.append(result if scores else None)
        return found

    monkeypatch.setattr("hora_bench.sweep.results", results)
    monkeypatch.setattr("hora_bench.search.results", results)
    return setting, seen, made


def noisy(asked, gain):
    """Fifty and a gain for what is no LoRA, with noise of the seed that both share and a little of its own."""
    shared = np.random.default_rng(asked.seed).normal(0, 4)
    own = np.random.default_rng([asked.seed, sum(asked.method.encode())]).normal(0, 1.0)
    return 50 + shared + own + (0 if asked.method == "lora" else gain)


@pytest.mark.parametrize(("gain", "word", "fewer"), [(8.0, "better", True), (-8.0, "worse", True), (0.5, None, False)])
def test_a_race_stops_what_is_settled_and_goes_on_with_what_is_not(gain, word, fewer, scored, tmp_path):
    setting, seen, made = scored
    made["accuracy"] = lambda asked: noisy(asked, gain)
    asked = Sweep(methods=["hora"], references=["lora"], search=Grid.of([1e-3]), seeds=range(12), race=4, margin=0.2)
    found = sweep.sweep(setting, tmp_path, asked)
    hora, lora = found["rows"]
    assert len(hora["accuracies_pct"]) == len(lora["accuracies_pct"]) == (4 if fewer else 12)
    assert hora["word"] == (word or "not resolved")
    assert hora["over_lora_pct"]["level"] == level_of_looks(3) == pytest.approx(1 - 0.05 / 3, abs=1e-6)
    low, high = hora["over_lora_pct"]["of_other_examples_pct"]
    assert low < hora["over_lora_pct"]["mean_pct"] < high
    assert hora["over_lora_pct"]["seeds_count"] == len(hora["accuracies_pct"])
    assert any("confirm it with fresh seeds" in note for note in found["notes"])
    assert {one.seed for one in seen if one.score_on == "test"} == set(range(4 if fewer else 12))


def test_lora_runs_on_while_any_choice_needs_it_and_the_settled_ones_stop(scored, tmp_path):
    setting, _, made = scored
    made["accuracy"] = lambda asked: noisy(asked, 8.0 if asked.method == "hora" else 0.0)
    asked = Sweep(
        methods=["hora", "mh-lora"], references=["lora"], search=Grid.of([1e-3]), seeds=range(8), race=4, margin=0.01
    )
    lengths = {row["value"]: len(row["accuracies_pct"]) for row in sweep.sweep(setting, tmp_path, asked)["rows"]}
    assert lengths == {"hora": 4, "mh-lora": 8, "lora": 8}


def test_a_race_between_equals_is_called_in_one_of_twenty(scored, tmp_path, monkeypatch):
    setting, _, made = scored
    monkeypatch.setattr("hora_bench.sweep._of_other_examples", lambda *_: {})
    monkeypatch.setattr(Setting, "load", lambda *_: None)
    made["examples"], wrong = 0, []
    for trial in range(60):
        made["accuracy"] = lambda asked, trial=trial: noisy(asked.replace(seed=1000 * trial + asked.seed), 0.0)
        asked = Sweep(
            methods=["hora"], references=["lora"], search=Grid.of([1e-3]), seeds=range(20), race=4, margin=0.01
        )
        wrong.append(sweep.sweep(setting, tmp_path, asked)["rows"][0]["word"] != "not resolved")
    assert np.mean(wrong) <= 0.12  # looking five times at 95 % each is wrong in one of seven


def test_rates_are_searched_with_equal_trials_by_the_mean_of_three_seeds(scored, tmp_path):
    setting, seen, made = scored
    peaks = {"hora": 6.4e-2, "lora": 2e-3}
    made["accuracy"] = lambda asked: 80 - abs(np.log2(asked.learning_rate / peaks[asked.method])) + 0.1 * asked.seed
    asked = Sweep.of(
        {
            "methods": ["hora"],
            "references": ["lora"],
            "search": {"rates": [1e-3, 2e-3, 4e-3]},
            "seeds": "0-4",
            "margin": 0.5,
        }
    )
    found = sweep.sweep(setting, tmp_path, asked)
    hora, lora = found["rows"]
    assert (hora["learning_rate"], hora["rate_at_edge"], lora["rate_at_edge"]) == (6.4e-2, None, None)
    counts = {name: sum(trial["value"] == name for trial in found["search"]) for name in peaks}
    assert counts["hora"] == counts["lora"] == 3 * 8
    assert {one.seed for one in seen if one.score_on == "val"} == {0, 1, 2}
    assert found["setting"]["margin_pct"] == 0.5
    assert "Of the seeds that judge, these searched, too, on validation: 0, 1, 2." in found["notes"]
    assert hora["word"] == "equal"


def test_a_best_rate_at_the_edge_resolves_nothing(scored, tmp_path):
    setting, _, made = scored
    made["accuracy"] = lambda asked: noisy(asked, 8.0) + 1e5 * asked.learning_rate * (asked.score_on == "val")
    seen = []
    asked = Sweep(methods=["hora"], references=["lora"], search=Grid.of([1e-5, 2e-5]), seeds=range(6))
    row = sweep.sweep(setting, tmp_path, asked, progress=lambda *counts: seen.append(counts))["rows"][0]
    assert row["over_lora_pct"]["low_pct"] > 0
    assert (row["rate_at_edge"], row["word"]) == ("highest", "not resolved")
    assert seen == [(2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(("search", "judges"), [(None, "val"), (Grid.of([1e-3]), "test")])
def test_a_run_that_diverged_counts_as_guessing_and_is_told(search, judges, scored, tmp_path):
    setting, _, made = scored
    made["accuracy"] = lambda asked: None if (asked.method, asked.seed) == ("hora", 1) else 60.0
    asked = Sweep(methods=["hora"], references=["lora"], seeds=[0, 1, 2], search=search)
    found = sweep.sweep(setting, tmp_path, asked)
    row = found["rows"][0]
    counts = np.unique(setting.load("digits").labels(judges), return_counts=True)[1]
    assert row["diverged_count"] == 1
    assert row["accuracies_pct"] == [60.0, 100 * counts.max() / counts.sum(), 60.0]
    assert "A run that diverged counts as guessing." in found["notes"]


def test_a_choice_that_diverges_with_every_seed_is_a_row_and_not_the_end_of_the_others(scored, tmp_path):
    setting, _, made = scored
    made["accuracy"] = lambda asked: None if asked.method == "hora" else 60.0
    found = sweep.sweep(setting, tmp_path, Sweep(methods=["hora"], references=["lora"], seeds=[0, 1]))
    hora, lora = found["rows"]
    counts = np.unique(setting.load("digits").labels("val"), return_counts=True)[1]
    assert hora["accuracies_pct"] == [100 * counts.max() / counts.sum()] * 2
    assert (hora["diverged_count"], lora["diverged_count"]) == (2, 0)
    assert [hora[name] for name in ("test_loss", "loss", "params_count", "labels_count")] == [None] * 4
    (cells,) = (row for table in tables("sweep", found) for row in table.rows if row[0].startswith("hora"))
    assert "None" not in cells


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ({"race": 1, "seeds": "0-3"}, "two seeds or more at a time"),
        ({"race": 4, "seeds": "0-3"}, "of more, got race 4 of 4"),
        ({"race": 2.5, "seeds": "0-3"}, "race in what is varied: input should be a valid integer, got 2.5"),
        ({"margin": 0}, "a margin is a positive number"),
        ({"margin": "1"}, "margin in what is varied: input should be a valid number"),
        ({"search": {"rates": [1e-3]}}, "a search that goes on"),
        ({"search": {"rates": []}}, "a search that goes on"),
        ({"search": 3}, "a search is a list of rates or a table, got 3"),
        ({"methods": "lora"}, "methods in what is varied: .* got 'lora'"),
        ({"factors": ["residual"]}, "factors in what is varied: input should be a valid dictionary"),
        (
            {"factors": {"residual": True}},
            "residual of factors in what is varied: input should be an instance of sequence",
        ),
        ({"variants": {"wide": 3}}, "wide of variants in what is varied: input should be a valid dictionary"),
        ({"seeds": 3}, "seeds are different whole numbers, got 3"),
        ({"factors": {"seed": [1, 2]}}, "cannot be varied, got seed"),
        ({"variants": {"deep": {"last_blocks": 6}}}, "a screen as a whole or not at all"),
        ({"search_seeds": [7]}, "search_seeds are those of a search"),
        ({"search": [1e-3], "seeds": "0-9", "search_seeds": "9-11"}, "different, got .9. in both"),
        ({"factors": {"learning_rate": [1.0]}, "search": [1e-3]}, "cannot be varied, got learning_rate"),
        ({"variants": {"x": {"score_on": "val"}}, "search": [1e-3]}, "cannot be varied, got score_on"),
    ],
)
def test_a_race_a_margin_and_a_search_that_cannot_be_are_refused(vary, message):
    with pytest.raises(HoraError, match=message):
        Sweep.of(vary)


def test_a_race_against_nobody_is_refused_before_anything_runs(scored, tmp_path):
    setting, seen, _ = scored
    with pytest.raises(HoraError, match="a race is against LoRA, got none"):
        sweep.sweep(setting, tmp_path, Sweep(methods=["hora"], seeds=range(4), race=2))
    assert not seen


def test_what_is_varied_reaches_the_data_too(scored, tmp_path, monkeypatch):
    setting, _, _ = scored
    wanted = []
    load = Setting.load

    def loaded(self, task, asked=None):
        wanted.append((asked.image_size_px, asked.limit))
        return load(self, task, asked)

    monkeypatch.setattr(Setting, "load", loaded)
    sweep.sweep(setting, tmp_path, Sweep(factors={"image_size_px": [64], "limit": [20], "residual": [True]}))
    assert sorted(wanted, key=str) == [(32, 20), (32, None), (64, None)]


def test_a_screen_runs_in_a_sweep_and_judges_no_claim(setting, tmp_path):
    screened = replace(setting, base=vary(setting.base, last_blocks=1))
    asked = Sweep.of({"methods": ["hora"], "references": ["lora"], "search": [1e-3], "seeds": "0-1"})
    found = json.loads(json.dumps(sweep.sweep(screened, tmp_path, asked)))
    assert found["notes"][0].startswith("Screen, a proxy: the last 1 blocks alone")
    (table,) = tables("sweep", found)
    assert table.title == "Screen, a proxy: test accuracy"
    said = verdicts([(Path("r.json"), {"experiment": "sweep", "result": found})])
    assert not [one for one in said if one.file]


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
    plot(found, tmp_path, stem="curve")
    assert "training data" in (tmp_path / "curve.svg").read_text()


def test_so_few_seeds_that_a_race_has_one_look_are_no_race():
    asked = Sweep(seeds=range(16), race=8)
    assert [len(batch) for batch in asked.with_seeds(range(20, 36)).batches] == [8, 8]
    assert (asked.with_seeds(range(8)).race, len(asked.with_seeds(range(8)).batches)) == (0, 1)


@pytest.mark.parametrize("given", ["", "a", "-1", "3-", "1,1", "5-1", "1.5", [True]])
def test_seeds_that_are_none_are_refused(given):
    with pytest.raises(HoraError, match="write 0-19"):
        seeds_of(given)


def test_steps_scale_the_warm_up_and_methods_keep_what_makes_them():
    base = request(options={"rank": 4, "activation": "tanh", "residual": False}, steps=100, warmup_steps=10)
    assert vary(base, steps=400).warmup_steps == 40
    assert vary(base, hidden_dim=80).options == {**base.options, "hidden_dim": 80}
    assert vary(base, method="lora").options == {**methods.find("lora").options, "rank": 4}
    kept = {"rank": 4, "activation": "tanh"}
    assert vary(base, method="hora-residual").options == {**methods.find("hora-residual").options, **kept}
    with pytest.raises(HoraError, match="the options of lora are rank, alpha, got gain"):
        vary(base, method="lora", gain=1.0)
