"""The page of experiments: rebuilt from result files alone, in two formats, with honest verdicts."""

import re
import shutil
from pathlib import Path

import pytest
from hora_bench.cache import read_json
from hora_bench.experiments.cost.run import cost
from hora_bench.experiments.page import write_page
from hora_bench.experiments.record import write_record
from hora_bench.experiments.verdicts import verdicts
from hora_spec import HoraError

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "packages/hora-bench/results"


@pytest.fixture
def checkout(tmp_path):
    """The committed results where they are in the repository, and a folder for pages."""
    shutil.copytree(RESULTS, tmp_path / RESULTS.relative_to(ROOT))
    return tmp_path


def test_the_committed_page_is_what_the_committed_results_say(checkout):
    written = write_page(checkout / RESULTS.relative_to(ROOT), checkout / "docs/benchmarks.md")
    for path in written:
        assert path.read_bytes() == (ROOT / path.relative_to(checkout)).read_bytes(), path.name
    assert {path.name for path in written[1:]} == {path.name for path in (ROOT / "docs/benchmarks").iterdir()}


def test_every_link_of_a_page_leads_to_a_file(checkout):
    page, *_ = write_page(checkout / RESULTS.relative_to(ROOT), checkout / "docs/benchmarks.md")
    targets = re.findall(r"\]\(([^)]+)\)", page.read_text())
    assert {path.name for path in RESULTS.glob("*.json")} <= {Path(target).name for target in targets}
    assert all((page.parent / target).is_file() for target in targets)


def test_the_html_page_holds_everything_and_is_the_same_twice(checkout):
    first, second = (
        write_page(checkout / RESULTS.relative_to(ROOT), checkout / folder / "page.html")[0].read_bytes()
        for folder in ("one", "two")
    )
    assert first == second
    html = first.decode()
    plots = list((ROOT / "docs/benchmarks").glob("*.svg"))
    assert html.count('src="data:image/svg+xml;base64,') == html.count("<img") == len(plots)
    for path in RESULTS.glob("*.json"):
        assert f">{path.name}</a>: <code>{read_json(path)['command']}</code>" in html


@pytest.mark.parametrize(
    ("results", "page", "message"), [("results", "p.pdf", "Markdown .* or HTML"), ("empty", "p.md", "got none")]
)
def test_a_page_that_cannot_be_written_says_why(checkout, results, page, message):
    (checkout / "empty").mkdir()
    with pytest.raises(HoraError, match=message):
        write_page(checkout / results, checkout / page)


def said(experiment, result):
    """Words of the verdicts that one result leads to."""
    content = {"experiment": experiment, "result": result}
    return [verdict.word for verdict in verdicts([(Path("r.json"), content)]) if verdict.file]


@pytest.mark.parametrize(
    ("low", "mean", "high", "word"),
    [(45.0, 50.0, 55.0, "confirmed"), (35.0, 50.0, 65.0, "not seen"), (41.5, 42.0, 42.5, "not seen")],
)
def test_one_percent_is_confirmed_by_intervals_apart_and_a_fifth_more(low, mean, high, word):
    def point(method, low, mean, high, fraction=0.01):
        interval = {"low_pct": low, "mean_pct": mean, "high_pct": high}
        return {"method": method, "fraction": fraction, "accuracies_pct": [mean, mean], **interval}

    curve = [point("lora", 39.0, 40.0, 41.0), point("hora", low, mean, high), point("hora", 98.0, 99.0, 99.5, 1.0)]
    assert said("sample-efficiency", {"setting": {"task": "made", "learning_rates": [1]}, "curve": curve}) == [word]


@pytest.mark.parametrize(("low", "word"), [(0.2, "confirmed"), (-0.2, "not seen"), (None, None)])
def test_more_accurate_is_confirmed_by_a_paired_interval_above_zero(low, word):
    differences = {"mean_pct": 1.0, "low_pct": low, "high_pct": low and 2.0}
    rows = [{"factor": "default", "value": None, "over_lora_pct": differences, "accuracies_pct": [1.0, 2.0]}]
    assert said("ablate", {"setting": {"task": "made"}, "rows": rows}) == [word] * (word is not None)


@pytest.mark.parametrize(("ratio", "word"), [(1.01, "confirmed"), (1.2, "not seen")])
def test_merged_inference_is_confirmed_where_no_method_is_slower(ratio, word):
    record = {"method": "hora", "form": "merged", "over_frozen": {"ratio": ratio}}
    assert said("speed", {"inference": [record]}) == [word]


@pytest.mark.parametrize(
    ("cosines", "references", "word"), [([0.8] * 6, [0.1] * 6, "confirmed"), ([0.1, -0.1] * 6, [], "not seen")]
)
def test_alike_heads_are_compared_with_lora_or_with_nothing_in_common(cosines, references, word):
    layers = [
        {"method": method, "layer": layer, "projection": "q", "mean_cosine_delta": cosine}
        for method, found in (("hora", cosines), ("lora", references))
        for layer, cosine in enumerate(found)
    ]
    assert said("similarity", {"setting": {"options": {}}, "layers": layers}) == [word]


def test_every_claim_has_a_verdict_without_any_result():
    assert {verdict.word for verdict in verdicts([])} == {"cannot be tested here"}
    assert len(verdicts([])) == 10


def test_the_committed_theory_passes_its_gates():
    result = read_json(RESULTS / "theory.json")["result"]
    assert len(result["gates"]) == 5
    assert all(gate["passed"] for gate in result["gates"])
    assert [found["identified"] for found in result["identify"]] == [True, False, False, False]


def test_the_committed_cost_is_what_the_formulas_say():
    stored = read_json(RESULTS / "cost.json")["result"]
    fresh = cost(torch=False, xla=False)
    assert stored["params"] == fresh["params"]
    assert stored["paper"] == fresh["paper"]
    counted = [{k: v for k, v in record.items() if not k.startswith("torch_")} for record in stored["macs"]]
    assert counted == fresh["macs"]


def test_a_record_has_a_line_per_table_row_and_reads_back(tmp_path):
    result = {"rows": [{"a": 1, "b": [2, 3]}, {"a": 4, "b": []}], "notes": ["x"], "setting": {"deep": {"er": None}}}
    write_record(tmp_path / "r.json", "cost", "hora-bench cost", seconds=1.23, result=result)
    assert read_json(tmp_path / "r.json")["result"] == result
    assert '   {"a": 1, "b": [2, 3]},\n' in (tmp_path / "r.json").read_text()
