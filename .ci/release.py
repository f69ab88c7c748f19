"""Whether what a tag names can be released; prints the part of the changelog that becomes the release's notes.

    python3 .ci/release.py v0.1.0

All four packages have the tag's version, ask for each other in it and, on GitHub, name the repository among their
addresses; the changelog has a dated heading for it with something below.
"""

import os
import re
import sys
import tomllib
from pathlib import Path

PACKAGES = ("hora-spec", "hora-torch", "hora-jax", "hora-bench")


def main(tag, root):
    """Print the notes; returns what is wrong."""
    version = tag.removeprefix("v")
    if not re.fullmatch(r"v\d+\.\d+\.\d+((a|b|rc)\d+)?", tag):
        return [f"a tag is v and a version such as v0.1.0, got {tag}"]
    notes, wrong = changes(version, (root / "CHANGELOG.md").read_text(encoding="utf-8"))
    for name in PACKAGES:
        content = tomllib.loads((root / "packages" / name / "pyproject.toml").read_text(encoding="utf-8"))
        wrong += [f"{name}: {problem}" for problem in problems(content["project"], version)]
    if not wrong:
        print(notes)
    return wrong


def changes(version, text):
    """Notes of a version, and what is wrong with them."""
    found = re.search(rf"^## {re.escape(version)} \(([^)\n]*)\)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if not found:
        return "", [f"CHANGELOG.md needs a heading `## {version} (YYYY-MM-DD)`"]
    wrong = []
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", found[1]):
        wrong.append(f"the heading of {version} in CHANGELOG.md must have a date, got ({found[1]})")
    if not found[2].strip():
        wrong.append(f"CHANGELOG.md says nothing about {version}")
    return found[2].strip(), wrong


def problems(project, version):
    """What keeps one package from being released."""
    if project["version"] != version:
        yield f"its version is {project['version']}, the tag's {version}"
    repository = os.environ.get("GITHUB_REPOSITORY")
    address = f"https://github.com/{repository}"
    if repository and project.get("urls", {}).get("Repository") != address:
        yield f'[project.urls] needs Repository = "{address}"'
    minor = ".".join(version.split(".")[:2])
    for requirement in project["dependencies"]:
        if requirement.startswith("hora-") and not requirement.endswith(f"~={minor}.0"):
            yield f"it asks for {requirement}, which need not be of {minor}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    found = main(sys.argv[1], Path(__file__).resolve().parents[1])
    for problem in found:
        print(f"release: {problem}", file=sys.stderr)
    sys.exit(bool(found))
