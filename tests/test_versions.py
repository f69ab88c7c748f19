"""The four packages are released together: one version, one Python, one bound per dependency."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECTS = {
    file.parent.name: tomllib.loads(file.read_text())["project"]
    for file in sorted(ROOT.glob("packages/*/pyproject.toml"))
}
ONE_FOR_ALL = ("version", "requires-python", "license", "license-files", "authors", "urls", "classifiers")


def requirements(name: str) -> list[Requirement]:
    """Dependencies of one package, those of its extras included."""
    project = PROJECTS[name]
    extras = project.get("optional-dependencies", {}).values()
    return [Requirement(text) for text in (*project["dependencies"], *(line for extra in extras for line in extra))]


def test_there_are_four_packages():
    assert list(PROJECTS) == ["hora-bench", "hora-jax", "hora-spec", "hora-torch"]


@pytest.mark.parametrize("field", ONE_FOR_ALL)
def test_all_packages_state_the_same(field):
    values = {name: project.get(field) for name, project in PROJECTS.items()}
    assert all(value == values["hora-spec"] for value in values.values()), values


@pytest.mark.parametrize("name", PROJECTS)
def test_a_package_knows_its_version(name):
    source = (ROOT / "packages" / name / "src" / name.replace("-", "_") / "__init__.py").read_text()
    assert re.findall(r'^__version__ = "(.*)"$', source, re.MULTILINE) == [PROJECTS[name]["version"]]


def test_the_changelog_knows_the_version():
    version = PROJECTS["hora-spec"]["version"]
    assert re.search(rf"^## \[?{re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", PROJECTS)
def test_the_licence_travels_with_every_package(name):
    assert (ROOT / "packages" / name / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("name", PROJECTS)
def test_our_packages_ask_for_the_exact_minor_of_each_other(name):
    major, minor, _ = Version(PROJECTS["hora-spec"]["version"]).release
    ours = [requirement for requirement in requirements(name) if requirement.name.startswith("hora-")]
    assert ours or name == "hora-spec"
    for requirement in ours:
        assert str(requirement.specifier) == f"~={major}.{minor}.0", requirement


def test_a_dependency_has_one_bound_and_its_pin_is_within_it():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    bounds: dict[str, set[str]] = {}
    for package in PROJECTS:
        for requirement in requirements(package):
            name = canonicalize_name(requirement.name)
            if not name.startswith("hora-"):
                bounds.setdefault(name, set()).add(str(requirement.specifier))
                assert name in pins, f"{package} needs {name}: pin it in constraints.txt"
                assert requirement.specifier.contains(pins[name]), f"{requirement} of {package}, pinned {pins[name]}"
    assert not (several := {name: found for name, found in bounds.items() if len(found) > 1}), several
