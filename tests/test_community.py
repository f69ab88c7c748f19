"""Files for people keep their word: what they cite exists, and what they state is what the packages state."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
TESTS = {
    name
    for file in [*ROOT.glob("packages/*/tests/**/*.py"), *ROOT.glob("tests/**/*.py")]
    for name in re.findall(r"^ *def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
}
ROWS = [line for line in SECURITY.splitlines() if line.startswith("| ") and "`test_" in line]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_each_promise_about_untrusted_files_has_its_tests(row):
    assert not (absent := set(re.findall(r"`(test_\w+)`", row)) - TESTS), absent


def test_there_are_promises():
    rows = re.findall(r"^\| (?!-|what)", SECURITY, re.MULTILINE)
    assert len(rows) == len(ROWS) > 5


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "packages/hora-spec/pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]
    assert citation["preferred-citation"]["url"] == project["urls"]["Paper"]
