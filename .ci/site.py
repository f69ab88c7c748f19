"""The documentation site as plain Markdown: what is written under docs/, and what the repository itself tells.

``python .ci/site.py`` writes all pages into ``.nox/pages``, where any builder that reads mkdocs.yml finds them. As a
hook of MkDocs it does so before each build, so that a live preview follows the sources. ``python .ci/site.py readme``
writes the tables of README.md.
"""

import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".ci"))

from pages import card, chooser, commands, entries, errors, recipes, support  # noqa: E402, F401

PAGES = ROOT / ".nox/pages"
DOCS, RESULTS = ROOT / "docs", ROOT / "packages/hora-bench/results"
PROJECT = {f"{name}.md": f"project/{name.lower()}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")}
BOX = b"<!-- here the site says what was measured -->"
LINK = re.compile(r"(\[(?:[^\[\]]|\[[^\]]*\])*\])\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def places() -> dict[Path, str]:
    """Where a file of the repository is on the site."""
    found = {file: file.relative_to(DOCS).as_posix() for file in sorted(DOCS.rglob("*")) if file.is_file()}
    found |= {file: f"results/{file.name}" for file in sorted(RESULTS.glob("*.json"))}
    return found | {ROOT / name: place for name, place in PROJECT.items()}


def sources(root: Path = ROOT) -> dict[str, Path]:
    """The file that a person changes to change a page; pages made from many files have none."""
    written = {place: file for file, place in places().items() if file.suffix == ".md"}
    return written | {f"recipes/{script.stem}.md": script for script in recipes.scripts(root)}


def generated() -> dict[str, str]:
    """Pages that are made: of errors, commands, recipes and what is supported."""
    return {
        "reference/errors.md": errors.page(ROOT),
        "reference/commands.md": commands.page(),
        "reference/support.md": support.page(ROOT),
        **recipes.pages(ROOT),
    }


def stage(folder: Path = PAGES, address: str | None = None) -> None:
    """Make `folder` hold the site's pages and nothing else; a file that is as it should be is not touched.

    With the address of the repository (``REPO_URL`` in the environment) pages say where they can be edited, and what is
    in the repository alone is linked there.
    """
    address = os.environ.get("REPO_URL", "") if address is None else address
    where = places()
    contents = {place: text.encode() for place, text in generated().items()}
    for file, place in where.items():
        content = file.read_bytes()
        text = relinked(content.decode(), file, where, address) if file.suffix == ".md" else None
        contents[place] = content if text is None else text.encode()
    for place, file in sources().items() if address else ():
        line = f"\n\n[Edit this page]({address}/edit/main/{file.relative_to(ROOT).as_posix()})\n"
        contents[place] = contents[place].rstrip() + line.encode()
    contents["index.md"] = contents["index.md"].replace(BOX, chooser.box(ROOT).encode())
    contents[card.PLACE] = card.picture()
    for place, content in contents.items():
        target = folder / place
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(folder).as_posix() not in contents:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            shutil.rmtree(path)


def relinked(text: str, file: Path, where: dict[Path, str], address: str = "") -> str:
    """The text of a page with links that lead where files are on the site; what is not there is linked at the address
    of the repository, or named where there is none.
    """

    def link(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(file.parent / found[2]))
        if target in where:
            path = os.path.relpath(where[target], os.path.dirname(where[file]) or ".")
            return f"{found[1]}({Path(path).as_posix()}{found[3] or ''})"
        if target.is_relative_to(DOCS):  # a page that is made
            return found[0]
        place = target.relative_to(ROOT).as_posix()
        return f"{found[1]}({address}/blob/main/{place}{found[3] or ''})" if address else found[1][1:-1]

    return LINK.sub(link, text)


def on_pre_build(**_: object) -> None:
    """As a hook of MkDocs."""
    stage()


def on_post_build(config: dict[str, object], **_: object) -> None:
    """As a hook of MkDocs: what links to the site must find the picture that stands beside them."""
    if wrong := card.fault(Path(str(config["site_dir"]))):
        raise ValueError(wrong)


if __name__ == "__main__":
    if sys.argv[1:] == ["readme"]:
        (ROOT / "README.md").write_text(chooser.readme(ROOT))
    else:
        stage()
