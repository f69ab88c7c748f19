"""The command line from outside."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from io import StringIO

import pytest
import typer
from hora_bench import cli, methods
from hora_bench.asset_table import ASSETS
from hora_bench.assets import Asset, UnavailableError, check_sha256
from hora_bench.commands import run as run_command
from hora_bench.commands import show
from hora_bench.dry_run import Workload, llama_by_torch, llama_by_xla
from hora_bench.methods import METHODS
from hora_bench.request import Request
from hora_bench.terminal import show_table
from hora_spec import PRESETS, HoraError, LayerShape, count_params, preset
from rich.console import Console
from typer.testing import CliRunner

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})


def run(*arguments):
    result = runner.invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_help_is_a_tour_of_every_command():
    text = run("--help")
    for name in ("demo", "run", "show", "methods", "assets", "schema", "cost", "theory"):
        assert f" {name} " in text


def test_every_method_and_asset_is_listed():
    assert all(method.name in run("methods") for method in METHODS)
    assert all(asset.name in run("assets", "list") for asset in ASSETS)


@pytest.mark.parametrize("name", PRESETS)
def test_every_named_setting_is_a_method_with_its_parameters(name):
    (method,) = [method for method in METHODS if method.preset == name]
    (row,) = [line for line in run("methods").splitlines() if line.startswith(f" {method.name} ")]
    layer = LayerShape.attention(embed_dim=384, num_heads=6)
    assert f" {name} " in row
    assert f" {12 * count_params(preset(name, 8), layer):,} " in row


def test_the_schema_is_printed_as_json():
    assert json.loads(run("schema"))["title"] == "RunResult"


def test_a_folder_is_trained_on_shown_and_not_trained_on_again(image_folder, vit_directory, tmp_path):
    command = ["run", image_folder, "--model", vit_directory, "--image-size", 32, "--batch-size", 10]
    command += ["--epochs", 1, "--out", tmp_path / "out", "--json", "--option", "rank=2"]
    first = json.loads(run(*command))
    assert first["request"]["steps"] == 10
    assert first["request"]["options"]["rank"] == 2
    assert first["scores"]["total_count"] == 20
    assert json.loads(run(*command)) == first
    assert "made hora on torch, seed 0:" in run(*[part for part in command if part != "--json"])
    assert "made" in run("show", tmp_path / "out")
    (row,) = json.loads(run("show", tmp_path / "out", "--json"))
    assert row["method"] == "hora"
    page = (tmp_path / "out/runs.html").read_text()
    assert "data:image/svg+xml" in page
    assert 'src="http' not in page


def test_several_seeds_are_several_runs_of_a_records_file(records_file, llama_directory, tmp_path):
    command = ["run", records_file, "--model", llama_directory, "--seeds", "0-1", "--steps", 2, "--batch-size", 4]
    found = [json.loads(line) for line in run(*command, "--device", "cpu", "--out", tmp_path, "--json").splitlines()]
    assert [one["request"]["seed"] for one in found] == [0, 1]
    assert {one["request"]["steps"] for one in found} == {2}
    assert {one["request"]["device"] for one in found} == {"cpu"}
    assert {one["request"]["schedule"] for one in found} == {"linear"}
    assert len([*tmp_path.glob("*/predictions.jsonl")]) == 2


def test_a_configuration_gives_defaults_that_the_command_line_overrides(tmp_path):
    options = {"model": "tiny", "method": "hora", "option": ["rank=2"], "mesh": "fsdp=2", "batch_size": 4}
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"options": options, "architecture": TINY}))
    text = run("run", "commonsense", "--config", path, "--backend", "jax", "--dry-run", "--mesh", "fsdp=2,tp=2")
    assert "tiny" in text
    assert "4 devices" in text
    assert "activations, estimated:" in text
    recomputed = run("run", "commonsense", "--config", path, "--backend", "jax", "--dry-run", "--remat")
    assert "activations, estimated, recomputed:" in recomputed
    assert "memory per device" in text


TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def planned(method, backend):
    work = Workload(batch_size=4, seq=256, depth=2, embed=32, mlp=48, heads=4, outputs=8 * 64)
    if backend == "jax":
        return llama_by_xla(TINY, method, work, dtype="float32")
    return llama_by_torch(TINY, method, work)


@pytest.mark.parametrize("name", ["hora", "full"])
def test_xla_and_torch_count_the_same_plan(name):
    ours, theirs = (planned(methods.find(name), backend) for backend in ("jax", "torch"))
    assert (ours.params_count, ours.trained_count) == (theirs.params_count, theirs.trained_count)
    assert ours.step_flops == pytest.approx(theirs.step_flops, rel=0.2)  # XLA counts norms and activations too


@pytest.mark.parametrize("name", ["lora", "dora", "vera"])
def test_peers_are_planned_on_abstract_weights(name):
    peer, full = (planned(m, "torch") for m in (methods.find(name).configured({"rank": 2}), methods.find("full")))
    assert 0 < peer.trained_count < peer.params_count - full.params_count + 1000
    assert peer.step_flops < full.step_flops


def test_a_whole_command_is_planned_with_the_number_of_its_runs(vit_directory):
    command = ["run", "vtab", "--dry-run", "--model", vit_directory, "--image-size", 32, "--method", "hora,lora"]
    text = run(*command, "--tune", "--seeds", "0-4")
    assert text.count("counted by torch") == text.count("memory per device") == 2 * 19  # without any data
    assert "in all 190 runs of such steps, and 760 trials before them" in text


def test_generated_answers_are_asked_for_with_their_beams(records_file, llama_directory, tmp_path):
    command = ["run", records_file, "--model", llama_directory, "--steps", 1, "--batch-size", 4, "--out", tmp_path]
    found = json.loads(run(*command, "--scoring", "generation", "--beams", 2, "--json"))
    assert (found["request"]["scoring"], found["request"]["beams"]) == ("generation", 2)


def test_methods_that_are_named_together_are_run_one_after_the_other(image_folder, vit_directory, tmp_path):
    command = ["run", image_folder, "--model", vit_directory, "--image-size", 32, "--steps", 1, "--out", tmp_path / "o"]
    found = [json.loads(line) for line in run(*command, "--method", "hora,lora", "--json").splitlines()]
    assert [one["request"]["method"] for one in found] == ["hora", "lora"]
    assert found[0]["request"]["options"]["rank"] == found[1]["request"]["options"]["rank"]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_table_shows_every_cell_whole_whatever_the_width(width):
    header = ["method", "route", *(f"column {number}" for number in range(8))]
    rows = [[name, "branch", *(f"{name}-{number}" for number in range(8))] for name in ("lora", "hora")]
    console = Console(width=width, file=StringIO())
    show_table(console, "Title", header, rows, keys=2)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    shown = [word for line in lines if line.startswith(" lora") for word in line.split()]
    assert [word for word in shown if word not in ("lora", "branch")] == rows[0][2:]
    assert shown.count("branch") == sum(line.startswith("Title") for line in lines)


def test_nothing_to_show_says_what_to_run(tmp_path):
    with pytest.raises(HoraError, match="hora-bench run TASK"):
        show.command(tmp_path)
    (tmp_path / "torn.json").write_bytes(b'{"schema_version": 1, \xff')
    with pytest.raises(HoraError, match=r"torn\.json must hold JSON.*remove it or restore it"):
        show.command(tmp_path)


DIGITS, TEXT = ["digits"], ["RECORDS"]
BAD = [
    # what is trained on what
    (["mnist"], "a task is one of"),
    (["image-folder"], "image-folder reads your own copy"),
    (["image-folder", "/nowhere"], "/nowhere, which does not exist"),
    (["vtab/mnist"], "vtab is one of cifar"),
    (["digits/0"], "digits is without members"),
    (["digits", "IMAGES"], "digits brings its own data"),
    (["EMPTY"], "got none of them"),
    ([*DIGITS, "--method", "lara"], "a method is one of hora"),
    ([*DIGITS, "--model", "/nowhere"], "--model must be an asset"),
    ([*DIGITS, "--model", "EMPTY"], "--model must be an asset"),
    ([*DIGITS, "--model", "vit_base_patch16_224.typo"], "--model must be an asset"),
    ([*DIGITS, "--backend", "jax", "--method", "dora"], "dora exists on torch, got --backend jax"),
    # numbers
    ([*DIGITS, "--lr", "-1"], "learning_rate of a run: input should be greater than 0, got -1"),
    ([*DIGITS, "--lr", "nan"], "learning_rate of a run: input should be a finite number"),
    ([*DIGITS, "--wd", "-0.1"], "weight_decay of a run"),
    ([*DIGITS, "--fraction", "0"], "fraction of a run: input should be greater than 0, got 0"),
    ([*DIGITS, "--fraction", "nan"], "should be less than or equal to 1"),
    ([*DIGITS, "--epochs", "nan"], "--epochs is a positive number, got nan"),
    ([*DIGITS, "--epochs", "-3"], "--epochs is a positive number, got -3.0"),
    ([*DIGITS, "--epochs", "1e300"], "steps of a run"),
    ([*DIGITS, "--seed", "-1"], "seed of a run: input should be greater than or equal to 0, got -1"),
    ([*DIGITS, "--seeds", "3-1"], "write 0-19"),
    ([*DIGITS, "--batch-size", "100000"], "batch_size of a run"),
    ([*DIGITS, "--image-size", "33"], "--image-size is a multiple of the patches"),
    ([*DIGITS, "--limit", "3"], "--limit leaves at least one example of each of 10 classes, got 3"),
    ([*DIGITS, "--tune", "--tune-lr", "high"], "--tune-lr takes numbers, got 'high'"),
    ([*DIGITS, "--tune", "--tune-lr", "1,1"], "--tune-lr takes different numbers"),
    ([*DIGITS, "--tune", "--tune-wd", "-1"], "weight_decay of a run"),
    # options of methods, ours and the peers'
    ([*DIGITS, "--option", "rank"], "--option takes key=value"),
    ([*DIGITS, "--option", "rank=2", "--option", "rank=4"], "each key once"),
    ([*DIGITS, "--option", "width=2"], "the options of hora are"),
    ([*DIGITS, "--option", "rank=1000000"], "from 1 to 4096, got 1000000"),
    ([*DIGITS, "--option", "activation=selu"], "selu"),
    ([*DIGITS, "--option", "alpha=nan"], "nan"),
    ([*DIGITS, "--option", "gain=x"], "x"),
    ([*DIGITS, "--method", "lora", "--option", "rank=-1"], "from 1 to 4096, got -1"),
    ([*DIGITS, "--method", "lora", "--option", "rank=2.5"], "from 1 to 4096, got 2.5"),
    ([*DIGITS, "--method", "lora", "--option", "rank=true"], "got True"),
    ([*DIGITS, "--method", "dora", "--option", "alpha=high"], "alpha of"),
    ([*DIGITS, "--method", "dora", "--option", "alpha=Infinity"], "alpha of"),
    ([*DIGITS, "--method", "eva", "--option", "rho=0.5"], "rho of"),
    ([*DIGITS, "--method", "hora-joint", "--option", "start_scale=rms"], "one of kaiming, rows, got 'rms'"),
    ([*DIGITS, "--method", "hora-joint", "--option", "start_batches=0"], "start_batches of hora-joint is a whole"),
    ([*DIGITS, "--method", "vera", "--option", "rank=0"], "rank of vera is a whole number"),
    ([*DIGITS, "--method", "vblora", "--option", "vectors=0"], "vectors of vblora is a whole number"),
    ([*DIGITS, "--method", "linear-probe", "--option", "rank=2"], "the options of linear-probe are none"),
    ([*TEXT, "--method", "linear-probe"], "linear-probe trains a classification head"),
    # what would change nothing
    ([*DIGITS, "--tune", "--lr", "1e-3"], "some options are what --tune chooses, got --lr"),
    ([*DIGITS, "--tune-lr", "1e-3"], "belong to --tune, got --tune-lr"),
    ([*DIGITS, "--steps", "2", "--epochs", "3"], "another way to say --steps, got --epochs"),
    ([*DIGITS, "--seeds", "0-1", "--seed", "3"], "another way to say --seeds, got --seed"),
    ([*DIGITS, "--scoring", "generation"], "belong to language models, got --scoring"),
    ([*DIGITS, "--beams", "4"], "belong to language models, got --beams"),
    ([*TEXT, "--image-size", "28"], "belongs to images, got --image-size"),
    ([*TEXT, "--beams", "4"], "beams are torch's, for answers that are generated"),
    ([*TEXT, "--beams", "4", "--scoring", "generation", "--backend", "jax"], "beams are torch's"),
    ([*DIGITS, "--mesh", "fsdp=2"], "mesh is JAX's, got --backend torch"),
    ([*DIGITS, "--dry-run", "--lr", "1"], "change nothing of a step's cost, got --lr"),
    ([*DIGITS, "--method", "lora,lora"], "--method names each method once"),
    ([*DIGITS, "--method", "hora,lora", "--option", "residual=true"], "the options of lora are rank, alpha"),
    ([*DIGITS, "--dry-run", "--json"], "change nothing of a step's cost, got --json"),
    ([*DIGITS, "--dry-run", "--backend", "jax", "--scan"], "change nothing of a step's cost, got --scan"),
    ([*DIGITS, "--dry-run", "--backend", "jax", "--method", "dora"], "dora exists on torch, got --backend jax"),
    ([*DIGITS, "--dry-run", "--method", "vblora"], "whose forward looks at its values"),
    # devices
    ([*DIGITS, "--backend", "jax", "--mesh", "dp=2"], "--mesh names the axes fsdp and tp"),
    ([*DIGITS, "--backend", "jax", "--mesh", "fsdp=0"], "--mesh names the axes fsdp and tp"),
    ([*DIGITS, "--backend", "jax", "--mesh", "fsdp=1,fsdp=1"], "--mesh names each axis once"),
    ([*DIGITS, "--backend", "jax", "--mesh", "fsdp=64"], "needs 64 devices"),
    ([*DIGITS, "--backend", "jax", "--dtype", "bfloat16"], "on JAX image models are trained in float32"),
    ([*DIGITS, "--device", "cuda"], "--device cuda needs a cuda device"),
    # files
    ([*DIGITS, "--out", "FILE"], "must be a directory that can be written to"),
    ([*DIGITS, "--config", "/nowhere"], "--config is one of llama-7b"),
    ([*DIGITS, "--config", "FILE"], "a configuration is JSON"),
    ([*DIGITS, "--config", "TYPO"], "options of a configuration are those of run, got learning_rate"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(given) for given, _ in BAD])
def test_bad_input_is_one_message_and_no_traceback_before_anything_is_trained(
    arguments, message, monkeypatch, capsys, vit_directory, llama_directory, image_folder, records_file, tmp_path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("hora_bench.run.fit", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(run_command.console, "quiet", False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no JSON")
    (tmp_path / "typo").write_text(json.dumps({"options": {"learning_rate": 1.0}}))
    places = {"IMAGES": image_folder, "RECORDS": records_file, "EMPTY": tmp_path / "empty", "FILE": tmp_path / "file"}
    places |= {"TYPO": tmp_path / "typo"}
    given, text = [str(places.get(argument, argument)) for argument in arguments], "RECORDS" in arguments
    usual = {"--model": llama_directory if text else vit_directory}
    usual |= {} if "--dry-run" in given else {"--out": tmp_path / "out"}
    usual |= {} if text else {"--image-size": 32}
    given += [str(part) for option, value in usual.items() if option not in given for part in (option, value)]
    monkeypatch.setattr("sys.argv", ["hora-bench", "run", *given])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "out").rglob("*.json"))


def test_every_option_of_run_is_in_a_request_refused_or_says_where_things_go():
    """An option that is added must be given a place here, and a test that it changes something."""
    parameters = {p.name for p in typer.main.get_command(cli.app).commands["run"].params} - {"help"}
    in_requests = {"lr": "learning_rate", "wd": "weight_decay", "option": "options", "image_size": "image_size_px"}
    named, fields = {in_requests.get(name, name) for name in parameters}, set(Request.model_fields)
    others = {"data", "seeds", "epochs", "tune", "tune_lr", "tune_wd", "dry_run", "out", "config", "as_json"}
    assert named - fields == others
    decided = {"warmup_steps", "schedule", "clip_norm", "drop_path", "train_on", "score_on"}  # by protocols
    decided |= {"last_blocks"}  # by files
    assert fields - named == decided


class Source:
    """Gives a file, or is unreachable."""

    def __init__(self, content=None):
        self.content = content

    def __str__(self):
        return "a source"

    def fetch(self, target):
        if self.content is None:
            raise UnavailableError("unreachable")
        (target / "file").write_text(self.content)
        return {}


def test_the_next_source_is_tried_and_a_fetched_asset_is_kept(cache):
    asset = Asset("made", "", "MIT", (Source(), Source("content"), Source("never")))
    lines = []
    assert (asset.get(lines.append) / "file").read_text() == "content"
    assert len(lines) == 3
    assert asset.origin["source"] == "a source"
    assert Asset("made", "", "MIT", (Source(),)).get() == cache / "assets/made"


def test_processes_that_want_the_same_asset_fetch_it_once(cache):
    fetched = []

    class Slow(Source):
        def fetch(self, target):
            fetched.append(target)
            time.sleep(0.2)
            return super().fetch(target)

    asset = Asset("made", "", "MIT", (Slow("content"),))
    (cache / "assets").mkdir(parents=True)
    (cache / "assets/.made.left").mkdir()  # by a process that was killed
    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(lambda _: asset.get(), range(3)))) == 1
    assert len(fetched) == 1
    assert {path.name for path in (cache / "assets").iterdir()} <= {"made", ".lock.made"}


def test_without_any_source_the_fix_is_named_and_nothing_is_left(cache):
    with pytest.raises(HoraError, match=r"needs one of its sources.*install"):
        Asset("made", "", "MIT", (Source(),)).get()
    assert not (cache / "assets/made").exists()


def test_a_wrong_checksum_is_refused(tmp_path):
    (tmp_path / "file").write_text("content")
    with pytest.raises(HoraError, match="must have sha256"):
        check_sha256(tmp_path / "file", "0" * 64)
