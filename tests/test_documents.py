"""The documents keep their word: every ``python`` block runs, every link inside the repository leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/*/README.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")


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
def test_code_blocks_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(program(document.read_text()), document, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("document", **named(DOCUMENTS))
def test_links_inside_the_repository_lead_somewhere(document):
    for target in LINK.findall(document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_meta_a_failing_block_points_at_its_line():
    text = "words\n\n```python\nx = 1\n```\nmore\n```python\nassert x == 2\n```\n"
    with pytest.raises(AssertionError) as caught:
        exec(compile(program(text), "document", "exec"), {})
    assert caught.tb.tb_next.tb_lineno == 8


def test_meta_the_quickstarts_hold_code():
    for name in ("README.md", "docs/quickstart-torch.md", "docs/quickstart-jax.md"):
        assert BLOCK.search((ROOT / name).read_text()), f"{name} shows no python block"
