"""What is mutated, and what its tests are: ``modules.toml``."""

import ast
import hashlib
import io
import json
import tokenize
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RAN = HERE / "ran.json"


@dataclass(frozen=True)
class Module:
    """A module to be mutated."""

    name: str
    tests: tuple[str, ...]
    imports: tuple[str, ...]
    root: Path = ROOT

    @property
    def package(self) -> Path:
        """Folder of the package."""
        own = self.name.partition(".")[0]
        return self.root / "packages" / own.replace("_", "-") / "src" / own

    @property
    def file(self) -> str:
        """Path of the module inside of the folder that holds its package."""
        return self.name.replace(".", "/") + ".py"

    @property
    def source(self) -> str:
        """The module as it is."""
        return (self.package.parent / self.file).read_text()

    def digests(self) -> dict[str, str]:
        """What results depend on: the module, and its tests with what is no test beside them."""
        return {
            "source": meaning(self.source),
            "tests": digest({file for test in self.tests for file in self.read(test)}),
        }

    def read(self, test: str) -> Iterator[Path]:
        """A file of tests, and what is no test beside it."""
        path = self.root / test
        yield path
        yield from (file for file in path.parent.glob("*.py") if not file.name.startswith("test_"))


def modules() -> Iterator[Module]:
    """Every module of ``modules.toml``."""
    for name, package in tomllib.loads((HERE / "modules.toml").read_text())["packages"].items():
        for own, tests in package["modules"].items():
            paths = tuple(f"{package['tests']}/{test}" for test in tests)
            yield Module(f"{name}.{own}", paths, tuple(package["import"]))


def stale() -> Iterator[str]:
    """Modules of ``ran.json`` that are no longer what was mutated."""
    sources = {module.name: module.source for module in modules()}
    for name, result in json.loads(RAN.read_text()).items():
        if name not in sources or meaning(sources[name]) != result["source"]:
            yield name


def meaning(source: str) -> str:
    """Digest of what a source does: without comments, docstrings and blank lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return hashlib.sha256("\n".join(line.rstrip() for line in lines if line.strip()).encode()).hexdigest()[:16]


def digest(files: Iterable[Path]) -> str:
    """Digest of files as they are."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]
