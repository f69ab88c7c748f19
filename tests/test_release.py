"""`.ci/release.py`, which a release must pass, and the workflows it is a part of."""

import ast
import re
import runpy
import shutil
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))


@pytest.fixture
def main(monkeypatch):
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    return runpy.run_path(str(ROOT / ".ci/release.py"))["main"]


@pytest.fixture
def checkout(tmp_path):
    """What a release is judged by, with a dated changelog."""
    for file in ROOT.glob("packages/*/pyproject.toml"):
        (tmp_path / file.relative_to(ROOT)).parent.mkdir(parents=True)
        shutil.copy(file, tmp_path / file.relative_to(ROOT))
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## 0.1.0 (2026-12-01)\n\nThe first.\n\n## 0.0.1 (2020-01-01)\n\nOld.\n"
    )
    return tmp_path


def replace(file, old, new):
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_the_notes_are_the_version_s_part_of_the_changelog(main, checkout, capsys):
    assert main("v0.1.0", checkout) == []
    assert capsys.readouterr().out == "The first.\n"


@pytest.mark.parametrize("tag", ["0.1.0", "v0.1", "release-1"])
def test_a_tag_that_is_no_version_is_refused(main, checkout, tag):
    assert "v0.1.0" in main(tag, checkout)[0]


@pytest.mark.parametrize("package", ["hora-spec", "hora-torch", "hora-jax", "hora-bench"])
def test_one_package_of_another_version_is_enough(main, checkout, package, capsys):
    replace(checkout / "packages" / package / "pyproject.toml", 'version = "0.1.0"', 'version = "0.1.1"')
    assert main("v0.1.0", checkout) == [f"{package}: its version is 0.1.1, the tag's 0.1.0"]
    assert not capsys.readouterr().out


def test_packages_of_a_new_minor_must_ask_for_each_other_in_it(main, checkout):
    for file in checkout.glob("packages/*/pyproject.toml"):
        replace(file, 'version = "0.1.0"', 'version = "0.2.0"')
    replace(checkout / "CHANGELOG.md", "## 0.1.0", "## 0.2.0")
    wrong = main("v0.2.0", checkout)
    assert {text.partition(":")[0] for text in wrong} == {"hora-torch", "hora-jax", "hora-bench"}


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("2026-12-01", "unreleased", "must have a date"),
        ("## 0.1.0", "## 0.1.1", "needs a heading"),
        ("The first.\n", "", "says nothing"),
    ],
)
def test_the_changelog_must_have_a_date_and_a_text(main, checkout, old, new, problem):
    replace(checkout / "CHANGELOG.md", old, new)
    assert [text for text in main("v0.1.0", checkout) if problem in text]


def test_on_github_the_packages_must_say_where_they_come_from(main, checkout, monkeypatch):
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/hora")
    assert len(main("v0.1.0", checkout)) == 4
    for file in checkout.glob("packages/*/pyproject.toml"):
        replace(file, "[project.urls]\n", '[project.urls]\nRepository = "https://github.com/someone/hora"\n')
    assert main("v0.1.0", checkout) == []


@pytest.mark.parametrize("file", sorted(ROOT.glob("packages/*/tests/**/*.py")), ids=lambda file: file.stem)
def test_a_package_s_tests_run_without_the_repository(file):
    """They are in its source distribution; where they read a page, they are skipped with that reason."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if any("allow_module_level=True" in ast.unparse(node) for node in tree.body if isinstance(node, ast.If)):
        return
    above = {ast.unparse(node.targets[0]) for node in tree.body if isinstance(node, ast.Assign) and _above(node)}
    for node in tree.body:
        marked = "in_repository" in map(ast.unparse, getattr(node, "decorator_list", ()))
        defines = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in {"in_repository", *above}
        names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        assert marked or defines or not (names & above or _above(node)), f"line {node.lineno}"


def _above(node):
    return "parents[3]" in ast.unparse(node)


def test_every_action_is_pinned_by_commit_and_says_its_version():
    used = [line for file in WORKFLOWS for line in re.findall(r"uses: (.*)", file.read_text(encoding="utf-8"))]
    assert len(used) > 20
    for line in used:
        assert line.startswith("./.github/workflows/") or re.fullmatch(
            r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+.*|[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line
        ), line


def test_one_action_is_pinned_once():
    pinned = {
        m for file in WORKFLOWS for m in re.findall(r"uses: ([\w/-]+)@([0-9a-f]{40})", file.read_text(encoding="utf-8"))
    }
    assert len(pinned) == len({name for name, _ in pinned})


def test_workflows_run_sessions_that_exist():
    """Of `python3 run NAME ...`, and of the nightly's table."""
    defined = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(encoding="utf-8"), re.MULTILINE))
    named = set()
    for file in WORKFLOWS:
        text = file.read_text(encoding="utf-8")
        for words in re.findall(r"python3? run ([^\n#]+)", text):
            named |= {word.strip('"').partition("(")[0] for word in words.split(" -- ")[0].split() if "$" not in word}
        for job in yaml.safe_load(text)["jobs"].values():
            named |= {*job.get("strategy", {}).get("matrix", {}).get("session", [])}
    assert {"build", "families", "serving", "integrations", "mutation", "parity", "tests"} <= named
    assert named <= defined
