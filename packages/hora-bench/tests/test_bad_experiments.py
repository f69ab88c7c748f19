"""Commands of experiments refuse what cannot be with one message, before anything is trained."""

import pytest
from hora_bench import cli

REQUEST = """
[request]
task = "digits"
model = "{model}"
image_size_px = 32
steps = 2
warmup_steps = 1
limit = 20
batch_size = 4
"""
ROBUST = "[vary.corruptions]\nnoise = [10]\n[vary.attack]\n"
SEARCHED = f"search = [1e-3, 2e-3]\n{ROBUST}epsilon = 1"
BAD_FILES = [  # command, what follows in the file, the message
    ("sweep", "[vary]\nmethods = ['lara']", "a method is one of"),
    ("sweep", "[vary.factors]\ncolour = [1]", "the options of hora are"),
    ("sweep", "[vary]\nseeds = '0-9999999999'", "at most 10000"),
    ("sweep", "[vary]\nsearch_seeds = ['a']", "different whole numbers"),
    ("sweep", "[vary]\ntasks = ['mnist']", "a task is one of"),
    ("sweep", "[vary]\nfractions = [0]", "fraction of a run"),
    ("sweep", "[vary]\nlearning_rates = [-1.0]", "learning_rate of a run"),
    ("sweep", "[vary.controls]\njax = ['dora']", "dora exists on torch"),
    ("sweep", "[vary.controls]\ntf = ['lora']", "backend of a run"),
    ("sweep", "seed = 3\n[vary]", "seeds of a comparison are in [vary]"),
    ("sweep", "last_blocks = 0", "last_blocks of a run"),
    ("sweep", "last_blocks = 9", "leaves at least one block frozen"),
    ("sweep", "last_blocks = 1\nbackend = 'jax'", "a screen (last_blocks) has backend torch"),
    ("sweep", "colour = 1", "got ['colour']"),
    ("robustness", "last_blocks = 1\n[vary]\nseeds = [0]", "corruptions are noise, blur, contrast, jpeg"),
    ("robustness", "[vary.corruptions]\nfog = [1]", "each with its strengths, got fog"),
    ("robustness", "[vary.corruptions]\nnoise = [0]", "strengths of noise (standard deviation, of 255)"),
    ("robustness", "[vary.corruptions]\njpeg = [nan, 20]", "strengths of jpeg (quality)"),
    ("robustness", f"{ROBUST}epsilon = 0", "got input should be greater than 0 at epsilon"),
    ("robustness", f"{ROBUST}epsilon = 1\nsize = 2", "an attack is a table of epsilon, steps, images, seed"),
    ("robustness", f"{ROBUST}epsilon = 1\nimages = 500", "images that are scored are a number"),
    ("robustness", f"{ROBUST}epsilon = 1", "at rates of their own, got no search"),
    ("robustness", f"[vary]\nrace = 2\nseeds = '0-3'\n{SEARCHED}", "got race: drop it"),
    ("robustness", f"[vary]\ncolour = 2\n{SEARCHED}", "is varied is among methods"),
    ("robustness", f"[vary]\n{SEARCHED}", "measured on a screen, got all blocks"),
    ("robustness", f"last_blocks = 1\n[vary]\n{SEARCHED}", "compared with LoRA, got none beside every choice"),
    (
        "robustness",
        f"last_blocks = 1\n[vary]\nmethods = ['lora']\n{SEARCHED}\nimages = 5",
        "an image of each class is attacked, got 5 of 10 classes",
    ),
    ("similarity", "[vary]\nsearch = [1]", "is among methods, seeds, got search"),
    ("similarity", "[vary]\nmethods = 'lora'", "methods in what is varied"),
    ("similarity", "[vary]\nmethods = ['vera']", "of HoRA's methods and LoRA, got vera"),
    ("similarity", "[vary]\nmethods = []", "got none"),
    ("similarity", "backend = 'jax'", "updates are compared on torch"),
    ("similarity", "last_blocks = 1", "a screen is for runs and sweeps"),
    ("signal", "[vary]\nmethods = ['vera']", "signals are measured after linear-probe"),
    ("signal", "[vary]\nbatches = 5", "batches in what is varied"),
    ("signal", "[vary]\nbatches = 30", "have two examples or more that training has not seen"),
    ("signal", "backend = 'jax'", "signals are measured on torch, got backend jax"),
    ("signal", "last_blocks = 1", "a screen is for runs and sweeps"),
    ("rates", "[vary]\nrates = [1e-3, 2e-3, 4e-3, 8e-3]\nseeds = [0, 1]", "measured on a screen, got no last_blocks"),
    (
        "rates",
        "seed = 3\nlast_blocks = 1\n[vary]\nrates = [1e-3, 2e-3, 4e-3, 8e-3]\nseeds = [0, 1]",
        "seeds of a curve are in [vary], got seed 3",
    ),
    ("rates", "last_blocks = 1\n[vary]\nseeds = [0, 1]", "got no rates"),
    ("rates", "last_blocks = 1\n[vary]\nrates = [1e-3, 2e-3, 4e-3]\nseeds = [0, 1]", "4 rates or more that rise"),
    ("rates", "last_blocks = 1\n[vary]\nrates = [2e-3, 1e-3, 4e-3, 8e-3]\nseeds = [0, 1]", "or more that rise"),
    ("rates", "last_blocks = 1\n[vary]\nrates = [0, 1e-3, 4e-3, 8e-3]\nseeds = [0, 1]", "0 of rates in what is varied"),
    ("rates", "last_blocks = 1\n[vary]\nrates = [1e-3, 2e-3, 4e-3, inf]\nseeds = [0, 1]", "or more that rise"),
    ("rates", "last_blocks = 1\n[vary]\nrates = [1e-3, 2e-3, 4e-3, 8e-3]\nseeds = [0]", "seeds in what is varied"),
    (
        "rates",
        "last_blocks = 1\n[vary]\nrates = [1e-3, 2e-3, 4e-3, 8e-3]\nseeds = [0, 1]\nhessian_seeds = 3",
        "some of the 2 seeds, got 3",
    ),
    (
        "rates",
        "last_blocks = 1\n[vary]\nrates = [1e-3, 2e-3, 4e-3, 8e-3]\nseeds = [0, 1]\nfall = 1.0",
        "more than the margin of 1, got fall 1",
    ),
    (
        "rates",
        "last_blocks = 1\n[vary]\nrates = [1e-3, 2e-3, 4e-3, 8e-3]\nseeds = [0, 1]\nmethods = ['linear-probe']",
        "got linear-probe, which has none",
    ),
    ("rates", "last_blocks = 1\n[vary]\nrates = [1e-3, 2e-3, 4e-3, 8e-3]\nseeds = [0, 1]\nsearch = [1]", "got search"),
    ("speed", "[vary]\nrounds = 0", "rounds in what is varied"),
    ("speed", "[vary]\nseq = 2", "seq in what is varied"),
    ("speed", "[vary]\ndevice = 'cpu'", "got device"),
    ("speed", "[vary]\ntorch = []\njax = []", "one method or more"),
    ("speed", "[vary]\ntorch = []\njax = ['dora']", "dora exists on torch"),
]


def refused(monkeypatch, capsys, *arguments):
    """The one message of a command that ends with it."""
    monkeypatch.setattr("sys.argv", ["hora-bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("command", "text", "message"), BAD_FILES, ids=[f"{c}-{t}" for c, t, _ in BAD_FILES])
def test_a_bad_experiment_is_one_message_and_no_traceback(
    command, text, message, monkeypatch, capsys, vit_directory, tmp_path
):
    file = tmp_path / "bad.toml"
    file.write_text(REQUEST.format(model=vit_directory) + text + "\n")
    monkeypatch.setattr("hora_bench.training.fit", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr("hora_bench.run.fit", lambda *_, **__: pytest.fail("trained"))
    assert message in refused(monkeypatch, capsys, command, file, "--out", tmp_path / "out/result.json")
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep"], "got neither"),
        (["sweep", "--quick", "FILE"], "got both"),
        (["sweep", "--quick", "--data", "."], "the quick setting brings its data"),
        (["sweep", "--quick", "--task", "digits"], "a piece is one of the file's tasks, none, got 'digits'"),
        (["rates", "--quick", "--task", "digits"], "a piece is one of the file's tasks, none, got 'digits'"),
        (["sweep", "--quick", "--out", "."], "must be a file, got a directory"),
        (["sweep", "--quick", "--out", "/proc/x.json"], "can be written to"),
        (["sweep", "BINARY"], "an experiment file is TOML"),
        (["sweep", "FLAT"], "[request] of an experiment file is a table, got 3"),
        (["speed", "--quick", "--device", "cuda"], "needs a cuda device"),
        (["speed", "--quick", "--cpu-clock", "--device", "cuda"], "say nothing about a GPU"),
        (["assets", "get", "nothing"], "an asset is one of"),
        (["cost", "--model", "gpt"], "models are"),
        (["theory", "--quick", "--full"], "got both"),
        (["theory", "identify", "--quick"], "has one size"),
        (["demo", "--out", "/proc/x"], "can be written to"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_other_commands_refuse_with_one_message(arguments, message, monkeypatch, capsys, tmp_path):
    places = {"FILE": tmp_path / "file.toml", "BINARY": tmp_path / "binary.toml", "FLAT": tmp_path / "flat.toml"}
    places["FILE"].write_text("")
    places["BINARY"].write_bytes(b"\xff\xfe")
    places["FLAT"].write_text("request = 3")
    monkeypatch.chdir(tmp_path)
    assert message in refused(monkeypatch, capsys, *(places.get(one, one) for one in arguments))
