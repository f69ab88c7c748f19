"""Programs that never heard of HoRA know it when the launcher starts them; directories say how they are loaded."""

import os
import subprocess
import sys

import hora_torch
import peft
import pytest
from hora_torch import HoraConfig
from hora_torch.__main__ import main

SMALL = {"r": 2, "hidden_dim": 6, "head_embed_dim": 5, "init_weights": False}
PROGRAM = """
import sys
import beside
from peft import PeftConfig
assert sys.modules[__name__].__dict__ is globals()
assert "elsewhere" not in sys.path
print(__name__, sys.argv[1:], PeftConfig.from_pretrained(sys.argv[1]).peft_type.value)
sys.exit(3)
"""


@pytest.fixture
def folder(tmp_path):
    """A program with a module of its own beside it, and an adapter."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "beside.py").write_text("")
    HoraConfig(r=3).save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_a_program_that_never_heard_of_hora_knows_it(folder):
    # where torchvision does not match torch, as beside a CPU build, nothing that imports it can start
    (folder / "sitecustomize.py").write_text("import sys; sys.modules['torchvision'] = None")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "hora_torch", "-m", "program", "adapter", "--flag", "-m"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "__main__ ['adapter', '--flag', '-m'] HORA\n", done.stderr
    assert done.returncode == 3


@pytest.mark.parametrize("arguments", [("-m", "program"), ("program.py",), (os.path.join("..", "{}", "program.py"),)])
def test_modules_and_scripts_have_their_own_arguments_path_and_status(folder, monkeypatch, capsys, arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["launcher"])
    monkeypatch.setattr(sys, "path", [str(folder) if arguments[0] == "-m" else "elsewhere", *sys.path])
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    with pytest.raises(SystemExit) as left:
        main([*(argument.format(folder.name) for argument in arguments), "adapter", "--flag", "-m"])
    assert left.value.code == 3
    assert capsys.readouterr().out == "__main__ ['adapter', '--flag', '-m'] HORA\n"


def test_a_program_that_ends_by_itself_succeeds(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text("")
    monkeypatch.setattr(sys, "argv", ["launcher"])
    monkeypatch.setattr(sys, "path", ["elsewhere", *sys.path])
    assert main([str(tmp_path / "program.py")]) == 0


@pytest.mark.parametrize("arguments", [[], ["-m"], ["--help"], ["-m", "--help"]])
def test_nothing_to_run_is_answered_with_the_usage(capsys, arguments):
    assert main(arguments) == 2
    usage, known = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: python -m hora_torch (-m MODULE | SCRIPT)")
    assert known == f"HoRA {hora_torch.__version__} is then known to PEFT."


def test_the_card_of_a_saved_adapter_says_how_it_is_loaded(families, tmp_path):
    model = peft.get_peft_model(families["llama"].model(), HoraConfig(**SMALL))
    model.add_adapter("other", HoraConfig(**SMALL))
    for _ in range(2):
        model.save_pretrained(tmp_path)
    for directory in (tmp_path, tmp_path / "other"):
        card = (directory / "README.md").read_text()
        assert card.count("## How to load this adapter") == 1
        assert "KeyError: 'HORA'" in card
        assert "import hora_torch" in card
        assert card.startswith("---\n")
    assert "PEFT" in (tmp_path / "README.md").read_text()  # what PEFT wrote is there


def test_what_a_user_wrote_into_the_card_stays(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    HoraConfig().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().startswith("---\nlicense: mit\n---\n# Mine\n\n## How to load")


def test_the_card_s_program_loads_the_adapter(families, tmp_path, monkeypatch):
    base = families["llama"].model()
    base.save_pretrained(tmp_path / "path-of-the-base-model")
    peft.get_peft_model(base, HoraConfig(**SMALL, base_model_name_or_path=None)).save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    program = card.partition("```python\n")[2].partition("```")[0]
    program = program.replace("path-of-this-directory", "adapter").replace("AutoModel", "AutoModelForCausalLM")
    monkeypatch.chdir(tmp_path)
    exec(program, found := {})
    assert found["model"].peft_config["default"].r == 2
