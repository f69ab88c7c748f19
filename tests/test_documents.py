"""The documents keep their word: code blocks and docstring examples run, links lead somewhere, formulas render."""

import doctest
import importlib
import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/*/README.md")])
MODULES = sorted(file for file in ROOT.glob("packages/*/src/**/*.py") if ">>> " in file.read_text())
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^```python\n[^`]*^```\n\n```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")

_spec = spec_from_file_location("site_pages", ROOT / ".ci/site.py")
SITE = module_from_spec(_spec)
_spec.loader.exec_module(SITE)
MADE = [ROOT / "docs" / place for place in (*SITE.generated(), *SITE.PROJECT.values())]  # when the site is built


def program(text: str) -> str:
    """The ``python`` blocks of a document as one program, each on the lines where it stands."""
    lines = [""] * text.count("\n")
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        code = block.group(1).splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines)


def named(documents) -> dict:
    return {"argvalues": documents, "ids": [str(file.relative_to(ROOT)) for file in documents]}


@pytest.mark.parametrize("document", **named([file for file in DOCUMENTS if BLOCK.search(file.read_text())]))
def test_code_blocks_run_and_print_what_is_shown_below_them(document, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = document.read_text()
    exec(compile(program(text), document, "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    for shown in PRINTED.findall(text):
        assert shown in printed


@pytest.mark.parametrize("file", **named(MODULES))
def test_docstring_examples_run(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = file.relative_to(ROOT).with_suffix("").parts[3:]
    module = importlib.import_module(".".join(part for part in parts if part != "__init__"))
    done = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert done.attempted > 0
    assert done.failed == 0


@pytest.mark.parametrize("document", **named(DOCUMENTS))
def test_mathematics_stands_between_dollars(document):
    """Neither the site nor GitHub renders the other notation."""
    assert not re.search(r"\\[()\[\]]", re.sub(r"`[^`]*`", "", document.read_text()))


@pytest.mark.parametrize("document", **named(DOCUMENTS))
def test_links_inside_the_repository_lead_somewhere(document):
    for target in LINK.findall(document.read_text()):
        found = (document.parent / target).resolve()
        assert found.exists() or found in MADE, f"{document.name} links to {target}"


RESULTS = sorted(
    file
    for kind in ("*.json", "*.md", "*.svg", "*.toml")
    for file in ROOT.rglob(kind)
    if not {".nox", "site", "results"} & set(file.relative_to(ROOT).parts[:-1][:1])
)


def test_results_do_not_name_the_machine_that_made_them():
    """Error messages of libraries quote where they are installed."""
    assert len(RESULTS) > 50
    for file in RESULTS:
        found = re.search(r"(/[\w.+-]+){2,}/site-packages|/(home|root|Users)/\w+", file.read_text(errors="ignore"))
        assert found is None, f"{file.relative_to(ROOT)} holds {found}"


@pytest.mark.parametrize(
    ("row", "case", "side"),
    [
        ("one decoded token", "decode: one token, in cached_factors", "hora"),
        ("the same in a call of its own", "decode: one token, in a call", "plain"),
        ("SmolLM2-135M's shape, 16 tokens", "tiny-step: SmolLM2-135M, 1 x 16", "hora"),
        ("a LLaMA of 2 layers", "tiny-step: LLaMA 2 x 64, 4 x 16", "hora"),
        ("a ViT of 4 layers", "tiny-step: timm ViT 4 x 192, batch 2, 64 px", "hora"),
    ],
)
def test_the_cost_of_small_calls_is_the_one_measured(row, case, side):
    results = json.loads((ROOT / "packages/hora-torch/benchmarks/results/compare-cpu.json").read_text())["results"]
    (line,) = [line for line in (ROOT / "docs/guide/scale.md").read_text().splitlines() if row in line]
    assert line.endswith(f"| {results[case][side]['wall']['ratio']:.2f} |")


def test_meta_a_failing_block_points_at_its_line():
    text = "words\n\n```python\nx = 1\n```\nmore\n```python\nassert x == 2\n```\n"
    with pytest.raises(AssertionError) as caught:
        exec(compile(program(text), "document", "exec"), {})
    assert caught.tb.tb_next.tb_lineno == 8


def test_meta_the_quickstarts_hold_code():
    for name in ("README.md", "docs/quickstart-torch.md", "docs/quickstart-jax.md"):
        assert BLOCK.search((ROOT / name).read_text()), f"{name} shows no python block"
    assert len(PRINTED.findall((ROOT / "README.md").read_text())) == 2
