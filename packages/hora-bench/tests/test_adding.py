"""What CONTRIBUTING says about adding a task, a method, a comparison and a claim is enough: one edit of each."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hora_bench
import pytest

ROOT = Path(__file__).parents[3]
if not (ROOT / "CONTRIBUTING.md").exists():
    pytest.skip("CONTRIBUTING is in the repository", allow_module_level=True)
SOURCES = Path(hora_bench.__file__).parent

# what is added -> file in the package, the line it goes before, what is written
EDITS = {
    "a task": (
        "data/catalog.py",
        '        Family(name="digits"',
        '        Family(name="stripes", kind="images", protocol=VISION, load=_stripes, members={}),\n',
    ),
    "a method": (
        "methods.py",
        '    _hora("hora-residual"',
        '    _hora("hora-narrow", "a narrow hypernetwork", hidden_dim=4),\n',
    ),
    "a claim to be judged": (
        "report/verdicts.py",
        '    ("more accurate than LoRA"',
        '    ("it runs", COMPARISONS, lambda result: [(CONFIRMED, f"{len(result[\'rows\'])} choices")]),\n',
    ),
}
READS = """
def _stripes(asked: Asked, member: str) -> Any:
    import numpy as np

    from hora_bench.data.images import Examples, ImageTask

    classes = np.arange(24) % 2
    images = list((200 * classes[:, None, None] * np.ones((24, 8, 8))).astype(np.uint8))
    parts = [Examples(images, classes)] * 3
    return ImageTask("stripes", 2, *parts, **asked.images)


"""
EXPERIMENT = """
[request]
task = "stripes"
model = "{model}"
image_size_px = 32
steps = 2
warmup_steps = 1
batch_size = 4

[vary]
methods = ["hora-narrow"]
references = ["lora"]
search = [1e-3]
seeds = [0, 1]
"""


def table():
    """Rows of CONTRIBUTING's table: what is added, and what is touched."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("| to add | touch |")[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| ([^|]+?) \| (.+) \|$", text, re.MULTILINE))


@pytest.fixture
def edited(tmp_path):
    """A copy of the package in which a task, a method and a claim are added as the text says."""
    shutil.copytree(SOURCES, tmp_path / "src/hora_bench", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "packages/hora-bench/experiments", tmp_path / "experiments")
    for name, before, line in EDITS.values():
        path = tmp_path / "src/hora_bench" / name
        text = path.read_text()
        assert text.count(before) == 1, name
        path.write_text(text.replace(before, line + before))
    catalog = tmp_path / "src/hora_bench/data/catalog.py"
    catalog.write_text(catalog.read_text().replace("def _folder(", READS.lstrip("\n") + "def _folder(", 1))
    return tmp_path


def test_the_text_names_one_place_for_each():
    rows = table()
    assert {"a comparison", *EDITS} <= set(rows)
    for what, (name, *_) in EDITS.items():
        assert name in rows[what].replace("hora_bench/", ""), what
    assert "one file in `experiments/`" in rows["a comparison"]


def test_a_task_a_method_a_comparison_and_a_claim_are_added_in_one_place_each(edited, vit_directory):
    file = edited / "stripes.toml"
    file.write_text(EXPERIMENT.format(model=vit_directory))
    options = ["--method", "hora-narrow", "--model", vit_directory, "--image-size", 32, "--steps", 2]
    commands = [
        ["methods"],
        ["run", "stripes", *options, "--out", edited / "runs", "--json"],
        ["sweep", file, "--out", edited / "results/stripes.json"],
        ["report", edited / "results", "--out", edited / "page.md"],
    ]
    program = "\n".join(
        (
            "import sys",
            "from hora_bench.cli import app",
            f"for command in {[[str(part) for part in command] for command in commands]!r}:",
            "    app(command, standalone_mode=False)",
        )
    )
    path = os.pathsep.join((str(edited / "src"), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        cwd=edited,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "hora-narrow" in done.stdout
    (run,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"schema_version"'))
    assert (run["request"]["task"], run["request"]["options"]["hidden_dim"]) == ("stripes", 4)
    rows = json.loads((edited / "results/stripes.json").read_text())["result"]["rows"]
    assert [row["value"] for row in rows] == ["hora-narrow", "lora"]
    page = (edited / "page.md").read_text()
    assert "| it runs | confirmed | 2 choices |" in page
    assert "stripes.json" in page
