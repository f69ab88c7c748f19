"""The page of experiments: rebuilt from result files alone, in two formats, with honest verdicts."""

import re
import shutil
from pathlib import Path

import pytest
from hora_bench.cache import read_json
from hora_bench.experiments.cost.run import cost
from hora_bench.report import labels
from hora_bench.report.comparisons import lines_of, plot
from hora_bench.report.page import write_page
from hora_bench.report.pieces import pieces_of, section
from hora_bench.report.rows import paired
from hora_bench.report.suites import members_of
from hora_bench.report.tables import judged_gates
from hora_bench.report.verdicts import verdicts
from hora_bench.report.writing import embedded
from hora_bench.request import Inputs, request
from hora_bench.stats import Difference
from hora_bench.store import Measured, RunResult, Scores, Trial, read, write_experiment
from hora_spec import HoraError

ROOT = Path(__file__).parents[3]
RESULTS = Path(__file__).parents[1] / "results"
PLACE = "packages/hora-bench/results"
in_repository = pytest.mark.skipif(not (ROOT / "noxfile.py").exists(), reason="the page is in the repository")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The committed results where they are in the repository."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(RESULTS, folder / PLACE)
    return folder


@pytest.fixture(scope="module")
def pages(checkout):
    """Pages and plots of the committed results."""
    return write_page(checkout / PLACE, checkout / "docs/benchmarks.md")


@in_repository
def test_the_committed_page_is_what_the_committed_results_say(checkout, pages):
    for path in pages:
        assert path.read_bytes() == (ROOT / path.relative_to(checkout)).read_bytes(), path.name
    assert {path.name for path in pages[1:]} == {path.name for path in (ROOT / "docs/benchmarks").iterdir()}


def test_every_link_of_the_pages_leads_to_a_file(pages):
    linked = set()
    for page in (path for path in pages if path.suffix == ".md"):
        targets = re.findall(r"\]\(([^)]+)\)", page.read_text())
        assert all((page.parent / target).is_file() for target in targets)
        linked |= {Path(target).name for target in targets}
    assert {path.name for path in RESULTS.glob("*.json")} <= linked
    assert {path.name for path in pages[1:]} <= linked


def test_versions_stand_once_on_the_pages(pages):
    text = "".join(page.read_text() for page in pages if page.suffix == ".md")
    places = re.findall(r"hora-spec 0\.1\.0, .*", text)
    assert len(places) == len(set(places))


def test_the_html_page_holds_its_plots_and_every_command(pages, tmp_path):
    few = ("theory.json", "joint-sign-digits.json", "signal.json")
    for name in few:
        shutil.copy(RESULTS / name, tmp_path / name)
    html = write_page(tmp_path, tmp_path / "page.html")[0].read_text()
    own = {f"{stem}.svg" for stem in ("theory", "joint-sign-digits", "signal-held", "signal-similarity")}
    own = [path for path in pages if path.name in own]
    assert all(embedded(path) in html for path in own)
    assert html.count('src="data:image/svg+xml;base64,') == html.count("<img") == len(own) + 1  # and all differences
    for name in few:
        assert f">{name}</a>: <code>{read_json(RESULTS / name)['command']}</code>" in html


@pytest.mark.parametrize(
    ("results", "page", "message"), [("results", "p.pdf", "Markdown .* or HTML"), ("empty", "p.md", "got none")]
)
def test_a_page_that_cannot_be_written_says_why(checkout, results, page, message):
    (checkout / "empty").mkdir(exist_ok=True)
    with pytest.raises(HoraError, match=message):
        write_page(checkout / results, checkout / page)


def said(experiment, result):
    """Words of the verdicts that one result leads to."""
    content = {"experiment": experiment, "result": result}
    return [verdict.word for verdict in verdicts([(Path("r.json"), content)]) if verdict.file]


SETTING = {"task": "made", "fraction": 1.0, "seeds": [0, 1, 2], "options": {}}


def row(method, accuracies, fraction=1.0, **more):
    mean = sum(accuracies) / len(accuracies)
    factor = {"factor": "default", "value": None} if method == "default" else {"factor": "method", "value": method}
    return {**factor, "fraction": fraction, "mean_pct": mean, "accuracies_pct": accuracies, "test_loss": 1.0, **more}


@pytest.mark.parametrize(
    ("accuracies", "word"),
    [([50, 51, 50.5], "confirmed"), ([41, 41.5, 40.8], "not seen"), ([35, 50, 62], "not resolved")],
)
def test_one_percent_is_judged_by_paired_differences_against_a_fifth_more(accuracies, word):
    rows = [row("lora", [40.0, 40.5, 39.5], 0.01), row("hora", accuracies, 0.01), row("hora", [99] * 3)]
    curve = [{"method": one["value"], **{k: v for k, v in one.items() if k not in ("factor", "value")}} for one in rows]
    search = [{"method": "hora", "fraction": 0.01, "learning_rate": 1}]
    result = {"setting": SETTING, "curve": curve, "search": search}
    assert said("sample-efficiency", result) == [word]


def over_lora(low, high):
    mean = 1.0 if low is None else (low + high) / 2
    return {"over_lora_pct": {"mean_pct": mean, "low_pct": low, "high_pct": high}}


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.2, 2.0, "confirmed"), (-0.2, 2.0, "not resolved"), (-3.0, -1.0, "not seen"), (None, None, "not resolved")],
)
def test_more_accurate_is_judged_by_the_whole_paired_interval(low, high, word):
    rows = [row("default", [50.0, 51.0, 52.0], **over_lora(low, high)), row("lora", [50.0] * 3, **over_lora(0, 0))]
    trials = [{"factor": "default", "value": None, "fraction": 1.0, "learning_rate": 1}]
    assert said("sweep", {"setting": SETTING, "rows": rows, "search": trials}) == [word]
    assert said("sweep", {"setting": SETTING, "rows": rows, "search": []}) == []  # at one rate nothing is decided


def test_a_verdict_tells_its_power_and_an_edge_of_the_grid():
    rows = [row("default", [50.0, 51.0, 52.0], **over_lora(1.0, 3.0), learning_rate=2)]
    rows.append(row("lora", [50.0] * 3, **over_lora(0, 0)))
    trials = [{"factor": "default", "value": None, "fraction": 1.0, "learning_rate": rate} for rate in (1, 2)]
    content = {"experiment": "sweep", "result": {"setting": SETTING, "rows": rows, "search": trials}}
    (found,) = (one for one in verdicts([(Path("r.json"), content)]) if one.file)
    assert "3 paired seeds, of which 1.25 could have been seen" in found.why
    assert "default's rate is the highest tried, a better may lie beyond" in found.why
    assert found.word == "not resolved"  # though the whole interval is above LoRA


MODELS = {"commonsense": "/somewhere/llama-7b"}


def run_of(task, method, seed, accuracy, *, changes=None, **groups):
    usual = {"model": MODELS.get(task, "vit_base_patch16_224.augreg_in21k"), "score_on": "test"}
    asked = request(task=task, method=method, seed=seed, train_on="train+val", **{**usual, **(changes or {})})
    return RunResult(
        schema_version=2,
        command="test",
        request=asked,
        inputs=Inputs(data_sha256=task, weights_sha256="", code_sha256="", versions={}),
        data={},
        weights={},
        trained_params_count=1,
        total_params_count=2,
        train_count=3,
        labels_count=3,
        scores=Scores(accuracy_pct=accuracy, correct_count=1, total_count=2, loss=1.0, groups_pct=groups),
        loss=[1.0],
        unreadable_images={},
        trials=[Trial(learning_rate=1.0, weight_decay=0.0, accuracy_pct=1.0, final_loss=1.0, file=None)],
        files={},
        measured=Measured(
            train_time_s=1.0, step_time_s=1.0, eval_time_s=1.0, peak_memory_bytes=1, step_seconds=[1.0], machine={}
        ),
    )


@pytest.mark.parametrize("suite", ["vtab", "fgvc", "commonsense"])
@pytest.mark.parametrize(("gain", "word"), [(6.0, "confirmed"), (-0.5, "not seen")])
def test_whole_suites_get_a_verdict_from_the_runs_that_exist(suite, gain, word, tmp_path):
    members = members_of(suite)
    assert len(members) == {"vtab": 19, "fgvc": 5, "commonsense": 8}[suite]
    for seed in range(3):
        for method, ahead in (("lora", 0.0), ("hora", gain + 0.01 * seed)):
            if suite == "commonsense":
                groups = dict.fromkeys(members, 50.0 + ahead)
                run_of(suite, method, seed, 50.0 + ahead, **groups).write(tmp_path)
                continue
            for member in members:
                run_of(member, method, seed, 50.0 + ahead).write(tmp_path)
    runs = [read(path) for path in sorted(tmp_path.glob("*.json"))]
    words = [one.word for one in verdicts([], runs) if "tasks" in one.why]
    assert words == [word]
    missing = [one for one in runs if one.request.task != members[0] or suite == "commonsense"]
    if suite != "commonsense":
        assert not [one for one in verdicts([], missing) if "tasks" in one.why]  # a mean of some tasks is none
    write_page(tmp_path, tmp_path / "page.md")
    assert f"on all {len(members)} tasks" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize(("ratio", "word"), [(1.01, "confirmed"), (1.2, "not seen")])
def test_merged_inference_is_confirmed_where_no_method_is_slower(ratio, word):
    record = {"method": "hora", "form": "merged", "over_frozen": {"ratio": ratio}}
    assert said("speed", {"inference": [record]}) == [word]


@pytest.mark.parametrize(
    ("cosines", "references", "word"), [([0.8] * 6, [0.1] * 6, "confirmed"), ([0.1, -0.1] * 6, [], "not resolved")]
)
def test_alike_heads_are_compared_with_lora_or_with_nothing_in_common(cosines, references, word):
    layers = [
        {"method": method, "layer": layer, "projection": "q", "mean_cosine_delta": cosine}
        for method, found in (("hora", cosines), ("lora", references))
        for layer, cosine in enumerate(found)
    ]
    assert said("similarity", {"setting": {"options": {}}, "layers": layers}) == [word]


def test_alike_heads_say_what_the_generator_does_without_any_data():
    records = [(path, read_json(path)) for path in sorted(RESULTS.glob("similarity-*.json"))]
    leaky, tanh = (one.why for one in verdicts(records) if one.claim.startswith("sharing makes"))
    assert "updates 0.86 with HoRA (leaky_relu)" in leaky
    assert "updates 0.01 with HoRA (tanh)" in tanh
    assert "the data do not ask for it: LoRA's heads, which are free, end at 0.0;" in leaky
    assert "before any data, have 0.31 with leaky_relu, -0.01 with tanh" in leaky
    assert "do not ask for it" not in tanh  # of which no LoRA was trained


@in_repository
def test_the_guide_says_of_a_joint_a_what_its_results_say():
    guide = " ".join((ROOT / "docs/guide/settings.md").read_text().split())
    words = {}
    for name in ("joint-sign-digits", "confirm-sign-digits"):
        path = RESULTS / f"{name}.json"
        (said,) = (one for one in verdicts([(path, read_json(path))]) if one.claim.startswith("ours: a joint"))
        rows = {row["value"]: row for row in read_json(path)["result"]["rows"]}
        over = paired(rows["joint"], rows["random-fixed-a"])
        assert over.low < 0 < over.high
        words[said.word] = (over.seeds, min(rows["lora"]["accuracies_pct"]))
    assert words["not resolved"][0] == 8
    assert words["confirmed"][0] == 16
    assert words["confirmed"][1] < 11  # of 10 classes
    assert "One of its 16 seeds on sign_digits left LoRA at guessing, and 8 seeds of an earlier comparison" in guide
    assert "Over a random A that is fixed, its control, it is the other way round: not resolved on sign_digits" in guide


@pytest.mark.parametrize(
    ("low", "high", "word"), [(0.3, 0.5, "confirmed"), (-0.02, 0.02, "not seen"), (0.0, 0.4, "not resolved")]
)
def test_heads_are_asked_alike_where_their_signals_are_more_alike_than_by_chance(low, high, word):
    bounds = {"mean": (low + high) / 2, "low": low, "high": high, "by_chance": [-0.01, 0.01]}
    names = ("similarity", "similarity_in_frame", "inputs_one", "inputs_own")
    which = {"task": "made", "state": "start", "seed": 0}
    summary = [{**which, "projection": p, "measure": name, **bounds} for p in "qv" for name in names]
    assert said("signal", {"setting": {"rank": 8}, "summary": summary}) == [word]


@pytest.mark.parametrize(
    ("outcomes", "word"),
    [("passed passed", "confirmed"), ("passed failed", "not seen"), ("passed not-resolved", "not resolved")],
)
def test_other_activations_recover_faster_where_both_gates_of_all_of_them_pass(outcomes, word):
    numbers = {"difference": -0.3, "low": -0.4, "high": -0.2, "bounds": [float("-inf"), 0.0]}
    gates = [{"activation": "identity", "outcome": "failed", **numbers}]  # which is judged by its own regression
    gates += [{"activation": "tanh", "outcome": one.replace("-", " "), **numbers} for one in outcomes.split()]
    assert said("theory-activations", {"setting": {"trials": 24}, "gates": gates}) == [word]


def piece(task, accuracies, **setting):
    """A tuned comparison of one task, as a file holds it: choices with their accuracies, LoRA among them."""
    rows, which = [], {"task": task, "fraction": 0.1}
    for name, found in accuracies.items():
        over = Difference.of(found, accuracies["lora"][: len(found)])
        mean, loss = round(sum(found) / len(found), 2), {"mean": 0.2, "low": 0.1, "high": 0.3}
        stored = {"mean_pct": over.mean, "low_pct": over.low, "high_pct": over.high}
        one = row(name, found, 0.1, task=task, learning_rate=2, params_count=10, over_lora_pct=stored)
        rows.append({**one, "mean_pct": mean, "loss_over_lora": None if name == "lora" else loss})
    trials = [
        {**which, "factor": "method", "value": name, "learning_rate": rate, "accuracy_pct": 50.0}
        for name in accuracies
        for rate in (1, 2, 3)
    ]
    return {"setting": {**SETTING, **which, **setting}, "rows": rows, "search": trials, "notes": []}


FOUND = {
    "one": {"lora": [50.0, 51.0, 52.0], "hora": [53.0, 54.1, 54.9], "dora": [50.0, 51.0, 52.5]},
    "other": {"lora": [60.0, 61.0, 62.0], "hora": [62.0, 63.1, 63.9], "dora": [58.0, 58.9, 60.1]},
    "third": {"lora": [60.0, 61.0, 62.0], "hora": [61.0, 62.1, 62.9]},
}


@pytest.mark.parametrize("setting", [{"last_blocks": 4}, {}])
def test_what_is_compared_task_by_task_is_read_as_one(setting, tmp_path):
    for task, accuracies in FOUND.items():
        command = f"hora-bench sweep experiments/x.toml --data FOLDER --task {task}"
        result = piece(task, accuracies, **setting)
        write_experiment(tmp_path / f"{task}.json", "sweep", command, seconds=1.0, result=result)
    write_page(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert ("## Screens" in page) == bool(setting) != ("## Whole models, task by task" in page)
    assert "10 % of one: [one.json](one.json) | 10 % of other: [other.json](other.json) | 10 % of third:" in page
    assert "| LoRA, % |  | 51.0 | 61.0 | 61.0 |  |" in page
    first, second, both = "+3.0 (+2.75 to +3.25), better", "+2.0 (+1.75 to +2.25), better", "+2.0 (-0.48 to +4.48)"
    assert re.search(rf"hora \| 10 \| {re.escape(first)}.* \| {re.escape(second)}.* \| {re.escape(both)}", page)
    assert (
        "| hora | +0.20 (+0.10 to +0.30) | +0.20 (+0.10 to +0.30) | +0.20 (+0.10 to +0.30) | +0.2 (+0.2 to +0.2) |"
        in page
    )
    assert "Better than LoRA on a task, and worse on none: hora." in page
    assert ("| more accurate than LoRA | not measured" in page) == bool(setting)  # a screen judges no claim


def test_what_a_race_stopped_at_different_seeds_is_paired_over_those_of_both():
    made = {"joint": [60.0, 61.0, 62.0], "random": [58.0, 59.0, 60.5, 0.0], "lora": [50.0, 51.0, 52.0, 53.0]}
    rows = [row(name, accuracies, task="made", params_count=1) for name, accuracies in made.items()]
    rows[2] |= over_lora(0, 0)
    for one in rows[:2]:
        one["over_lora_pct"] = {"mean_pct": 9.0, "low_pct": 8.0, "high_pct": 10.0, "level": 0.975}
    trials = [{"factor": "method", "value": name, "fraction": 1.0, "learning_rate": 2} for name in made]
    content = {"experiment": "sweep", "result": {"setting": SETTING, "rows": rows, "search": trials}}
    (found,) = (one.why for one in verdicts([(Path("r.json"), content)]) if one.claim.startswith("ours: a joint"))
    assert "over a random A, fixed, +1.83 (+0.8 to +2.87) points over 3 paired seeds" in found  # t at 97.5 %


def test_a_control_is_paired_with_what_it_controls_task_by_task(tmp_path):
    made = {"lora": [50.0, 51.0, 52.0], "joint": [60.0, 61.0, 62.0], "random-fixed-a": [58.0, 59.0, 60.5, 0.0]}
    made["lora"] = [*made["lora"], 53.0]
    result = piece("one", made, last_blocks=4)
    found = pieces_of([(tmp_path / "r.json", {"experiment": "sweep", "command": "c", "result": result})], proxy=True)
    text = "\n".join(section("c", found["c"], tmp_path / "page.md"))
    assert "| joint over a random A |  | +1.83 (+1.12 to +2.55), better" in text
    assert "| random-fixed-a | +8.00, ahead in 3 of 4 seeds |" in text  # whose mean is -7.13: one seed collapsed


@pytest.mark.parametrize(("sizes", "curve"), [((10, 20, 40), True), ((10, 10, 40), False)])
def test_methods_of_several_sizes_are_a_curve_over_parameters(sizes, curve, tmp_path):
    rows = [
        {**row(f"{method}, {rank}", [50.0, 51.0]), "method": method, "params_count": count}
        for method in ("lora", "hora")
        for rank, count in enumerate(sizes)
    ]
    (drawn,) = plot({"setting": SETTING, "rows": rows}, tmp_path, stem="made")
    assert ("trained parameters" in drawn.read_text()) == curve


def test_tasks_of_one_result_are_told_apart():
    rows = [row(name, [50.0, 51.0], task=task) for task in ("one", "other") for name in ("lora", "hora")]
    found = {"setting": {**SETTING, "last_blocks": 4}, "rows": rows, "search": []}
    assert [line[1] for line in lines_of(found)[1]] == ["100 % of one"] * 2 + ["100 % of other"] * 2


@in_repository
def test_the_text_says_of_a_screen_what_was_measured():
    rows = {(row["method"], row["contender"]): row for row in read_json(RESULTS / "screen-cost.json")["result"]["rows"]}
    whole, screened = (rows["lora", name] for name in ("full, 56 px", "screen, 8 seeds"))
    said = " ".join((Path(__file__).parents[1] / "README.md").read_text().split())
    assert f"takes {1000 * screened['median_s']:.0f} ms of processor time a seed" in said
    assert (
        f"at 56 px {1000 * whole['median_s']:.0f} ms, {screened['full_over_this']['ratio']:.1f} times as much" in said
    )


def test_every_claim_has_a_verdict_without_any_result():
    assert {verdict.word for verdict in verdicts([])} == {"not measured"}
    assert len(verdicts([])) == 18


@pytest.mark.parametrize(
    "changes",
    [{"model": "smollm2-135m"}, {"model": "llama-13b"}, {"limit": 200}, {"fraction": 0.1}, {"score_on": "val"}],
)
def test_runs_of_another_model_or_on_part_of_the_data_judge_no_claim_on_a_suite(changes):
    groups = dict.fromkeys(members_of("commonsense"), 50.0)
    runs = [
        run_of("commonsense", method, seed, 50.0, changes=changes, **groups)
        for method in ("lora", "hora")
        for seed in range(3)
    ]
    said_of = {one.claim: one.word for one in verdicts([], runs) if one.claim.endswith("LLaMA-7B: 1.7 above LoRA")}
    assert said_of == {"commonsense reasoning, LLaMA-7B: 1.7 above LoRA": "not measured"}


def test_the_regression_with_more_trials_supersedes_the_other():
    records = [(path, read_json(path)) for path in (RESULTS / "theory.json", RESULTS / "theory-full.json")]
    (found,) = (one for one in verdicts(records) if "sample complexity" in one.claim)
    assert found.file.name == "theory-full.json"
    assert found.word == "not resolved"
    assert "40 trials" in found.why


def test_the_committed_theory_identifies_with_full_sharing_alone():
    for name in ("theory", "theory-full"):
        result = read_json(RESULTS / f"{name}.json")["result"]
        assert [found["identified"] for found in result["identify"]] == [True, False, False, False]
        assert "failed" not in [one["outcome"] for one in judged_gates(result)]


def test_the_committed_cost_is_what_the_formulas_say():
    stored = read_json(RESULTS / "cost.json")["result"]
    fresh = cost(torch=False, xla=False)
    assert stored["params"] == fresh["params"]
    assert stored["paper"] == fresh["paper"]
    counted = [{k: v for k, v in record.items() if not k.startswith("torch_")} for record in stored["macs"]]
    assert counted == fresh["macs"]


def test_a_record_has_a_line_per_table_row_and_reads_back(tmp_path):
    result = {"rows": [{"a": 1, "b": [2, 3]}, {"a": 4, "b": []}], "notes": ["x"], "setting": {"deep": {"er": None}}}
    write_experiment(tmp_path / "r.json", "cost", "hora-bench cost", seconds=1.23, result=result)
    assert read_json(tmp_path / "r.json")["result"] == result
    assert '   {"a": 1, "b": [2, 3]},\n' in (tmp_path / "r.json").read_text()


def judged_in(file, choice):
    """The words for a choice in the committed pieces of a comparison."""
    contents = [read_json(path) for path in sorted(RESULTS.glob("*.json"))]
    rows = [row for c in contents if f"experiments/{file} " in c["command"] for row in c["result"]["rows"]]
    return [row["word"] for row in rows if row["value"] == choice]


@pytest.mark.parametrize(("file", "choice"), [("wrong-labels.toml", "joint"), ("screen.toml", "default")])
def test_questions_are_answered_by_what_all_files_say(file, choice, pages):
    text = pages[0].read_text().split("## Questions and answers")[1].split("\n## ")[0]
    words = judged_in(file, choice)
    assert {"better", "worse"} & set(words)
    said = re.search(rf"{file.removesuffix('.toml')} \(a screen\): ([^.|]*)", text)[1]
    for word in {"better", "worse"} & set(words):
        assert f"`{choice}` on {words.count(word)} of {len(words)}" in re.search(rf"{word} ([^;]*)", said)[1]
    assert "`paper`" not in text  # of another size


def test_files_without_an_answer_ask_no_question(tmp_path):
    shutil.copy(RESULTS / "cost.json", tmp_path)
    assert "Questions and answers" not in write_page(tmp_path, tmp_path / "page.md")[0].read_text()


def swept(task, **accuracies):
    """A screen of one task, as a file holds it."""
    result = piece(task, accuracies, last_blocks=4, steps=50, fraction=0.1, seeds=[0, 1, 2, 3])
    return Path(f"{task}.json"), {"experiment": "sweep", "result": result}


def test_wrong_labels_are_compared_at_equal_clean_accuracy():
    right = {"lora": [50.0, 60.0, 70.0, 60.0], "joint": [80.0, 90.0, 85.0, 85.0]}
    wrong = {"lora": [30.0, 40.0, 40.0, 30.0], "joint": [45.0, 55.0, 50.0, 50.0]}
    answers = [{"task": "made", "answer": "corruptions", "chance_pct": 10.0}]
    robust = (Path("robust.json"), {"experiment": "robustness", "result": {"answers": answers}})
    records = [swept("made-wrong20", **wrong), swept("made", **right), robust]
    lines = [line for line in labels.section(records) if line.startswith("| ")]
    lora, joint = (next(line for line in lines if f" {name} " in line).split(" | ") for name in right)
    assert float(lora[4]) == pytest.approx(50.0)  # 35 of 60 percent, 10 of which are chance
    assert float(joint[4]) == pytest.approx(100 * 40 / 75, abs=0.01)
    assert joint[5].startswith("+3.33 (")
    assert not labels.section(records[:2])
    assert not labels.section([records[0], robust])
