"""The command line from outside."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from io import StringIO

import pytest
from hora_bench import cli, methods
from hora_bench.asset_table import ASSETS
from hora_bench.assets import Asset, UnavailableError, check_sha256
from hora_bench.commands import show
from hora_bench.dry_run import by_torch, by_xla
from hora_bench.dry_run.plan import Workload
from hora_bench.methods import METHODS
from hora_bench.models.llama import LlamaConfig
from hora_bench.terminal import show_table
from hora_spec import HoraError
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


def test_the_schema_is_printed_as_json():
    assert json.loads(run("schema"))["title"] == "RunResult"


def test_a_folder_is_trained_on_shown_and_not_trained_on_again(image_folder, vit_directory, tmp_path):
    command = ["run", "image-folder", image_folder, "--model", vit_directory, "--image-size", 32, "--batch-size", 10]
    command += ["--epochs", 1, "--out", tmp_path / "out", "--json", "--option", "rank=2"]
    first = json.loads(run(*command))
    assert first["request"]["steps"] == 10
    assert first["request"]["options"]["rank"] == 2
    assert first["scores"]["total_count"] == 20
    assert json.loads(run(*command)) == first
    assert "made" in run("show", tmp_path / "out")
    (row,) = json.loads(run("show", tmp_path / "out", "--json"))
    assert row["method"] == "hora"
    page = (tmp_path / "out/runs.html").read_text()
    assert "data:image/png" in page
    assert "http" not in page


def test_a_configuration_gives_defaults_that_the_command_line_overrides(tmp_path):
    options = {"model": "tiny", "method": "hora", "option": ["rank=2"], "mesh": "fsdp=2", "batch_size": 4}
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"options": options, "architecture": TINY}))
    text = run("run", "commonsense", "--config", path, "--dry-run", "--mesh", "fsdp=2,tp=2")
    assert "tiny" in text
    assert "4 devices" in text
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
        return by_xla.count_llama(LlamaConfig.from_hf(TINY), method, work, dtype="float32")
    return by_torch.count_llama(TINY, method, work)


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


def test_an_image_task_is_planned_without_its_data(vit_directory):
    text = run("run", "vtab/svhn", "--dry-run", "--model", vit_directory, "--image-size", 32, "--method", "lora")
    assert "counted by torch" in text
    assert "memory per device" in text


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["image-folder"], "reads your own copy"),
        (["digits", "--lr", "-1"], "learning_rate of a run: input should be greater than 0, got -1"),
        (["digits", "--fraction", "0"], "fraction of a run: input should be greater than 0, got 0"),
        (["digits", "--tune", "--tune-lr", "high"], "--tune-lr takes numbers, got 'high'"),
        (["digits", "--option", "rank=[8]"], "got [8]"),
        (["digits", "--mesh", "fsdp=2"], "got --backend torch: use accelerate launch"),
        (["digits", "--dtype", "bfloat16"], "image models are trained in float32"),
        (["digits", "--backend", "jax", "--method", "dora"], "dora exists on torch, got --backend jax"),
    ],
)
def test_bad_input_is_one_message_and_no_traceback(arguments, message, monkeypatch, capsys, vit_directory, tmp_path):
    given = ["hora-bench", "run", *arguments, "--model", str(vit_directory), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", given)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.rglob("*.json"))


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
