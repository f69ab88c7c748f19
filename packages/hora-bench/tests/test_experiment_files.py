"""The experiment files of the package are found by name, a file of the caller's goes first, and results are theirs."""

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from hora_bench import methods
from hora_bench.cache import read_json
from hora_bench.choices import Sweep, choices
from hora_bench.experiments.files import SHIPPED, experiment_file
from hora_bench.experiments.rates.run import rates
from hora_bench.experiments.robustness.run import Plan
from hora_bench.experiments.signal.run import signal
from hora_bench.experiments.similarity.run import similarity
from hora_bench.experiments.speed.run import speed
from hora_bench.report.rows import COMPARISONS, rows_of
from hora_bench.request import vary
from hora_bench.setting import read_setting
from hora_spec import HoraError

RESULTS = Path(__file__).parents[1] / "results"


@pytest.mark.parametrize("text", ["control-digits", "control-digits.toml", "experiments/control-digits.toml"])
def test_a_name_is_a_file_of_the_package_wherever_one_is(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    assert experiment_file(text) == SHIPPED / "control-digits.toml"


def test_a_file_of_the_caller_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("control-digits.toml").touch()
    assert experiment_file("control-digits.toml") == Path("control-digits.toml")


@pytest.mark.parametrize("text", ["control", "elsewhere/control-digits.toml", ""])
def test_what_is_not_there_is_answered_with_what_is(text):
    with pytest.raises(typer.BadParameter, match=r"one of ablate-sign-digits, .*control-digits"):
        experiment_file(text)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_result_is_of_its_experiment_file_as_it_is_now(path):
    content = read_json(path)
    named = re.search(r"experiments/(\S+\.toml)(?: --data FOLDER)?(?: --task (\S+))?$", content["command"])
    if named is None:
        return
    setting, result = read_setting(SHIPPED / named[1], quick=None, data=None), content["result"]
    varied = {**setting.vary, **({"tasks": [named[2]]} if named[2] else {})}
    if content["experiment"] == "robustness":
        plan, stored = Plan.of(setting.vary), result["setting"]
        assert [*plan.sweep.seeds] == stored["seeds"]
        assert (plan.corruptions, plan.attack.model_dump(), plan.images, plan.sweep.margin) == tuple(
            stored[name] for name in ("corruptions", "attack", "images", "margin_pct")
        )
        asked = replace(plan.sweep, tasks=[named[2]] if named[2] else plan.sweep.tasks)
        assert [(one.factor, one.value, one.request.task) for one in choices(setting.base, asked)] == [
            (one["factor"], one["value"], one["task"]) for one in result["choices"]
        ]
        return
    if content["experiment"] not in COMPARISONS:
        assert {name: result["setting"][name] for name in varied if name in result["setting"]}.items() <= varied.items()
        return
    asked = Sweep.of(varied)
    rows = [(row["factor"], row["value"], row["fraction"]) for row in rows_of(result)]
    assert {(one.factor, one.value, one.request.fraction) for one in choices(setting.base, asked)} <= {*rows}
    assert tuple(result["setting"]["seeds"]) == asked.seeds


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


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_every_experiment_file_fits_its_command(path):
    found = read_setting(path, quick=None, data=None)
    others = {"similarity": similarity, "signal": signal, "rates": rates, "speed": speed}
    own = next((run for name, run in others.items() if path.stem.startswith(name)), None)
    if own is not None:
        assert set(found.vary) <= set(inspect.signature(own).parameters)
        return
    robust = path.stem.startswith("robustness")
    asked = Plan.of(found.vary).sweep if robust else Sweep.of(found.vary)
    for method in (*asked.methods, *asked.references):
        assert methods.find(method).configured(vary(found.base, method=method).options)
    for changes in asked.variants.values():
        assert vary(found.base, **changes) != found.base


@pytest.mark.parametrize(("path", "quick", "given"), [(None, None, "neither"), (Path("one.toml"), {}, "both")])
def test_an_experiment_takes_a_file_or_is_quick(path, quick, given):
    with pytest.raises(HoraError, match=f"--quick, got {given}"):
        read_setting(path, quick=quick, data=None)
