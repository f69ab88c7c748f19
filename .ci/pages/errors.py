"""Every error of the packages, read from their source: what it says, what to do, where it is raised."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("hora_spec", "hora_torch", "hora_jax", "hora_bench")
LEAD = """# Errors

Every error that the packages raise for bad input, read from their source when this site is built. All are
`hora_spec.HoraError`, a `ValueError`; nothing has changed in memory or on disk when one is raised. *…* stands for what
depends on the call. Errors of other libraries, and reasons that take more than a line, are in
[When something is refused](../guide/troubleshooting.md).
"""
RULE = re.compile(r"\(spec ([A-Z]\d+)[^)]*\)")


class Error(NamedTuple):
    """A message and the module that raises it."""

    module: str
    message: str

    @property
    def rule(self) -> str:
        """The rule of the specification that it cites, or nothing."""
        found = RULE.search(self.message)
        return found.group(1) if found else ""

    @property
    def parts(self) -> tuple[str, str]:
        """What is wrong, and what to do about it: a message says the latter after its last colon."""
        text = RULE.sub("", self.message).strip()
        said, colon, cure = text.rpartition(": ")
        return (said, cure.removeprefix("…; ")) if colon and cure.strip("… ") else (text, "")


def errors(root: Path) -> list[Error]:
    """All errors of all packages, those of derived classes too, in the order of their modules."""
    trees = {}
    for package in PACKAGES:
        source = root / f"packages/{package.replace('_', '-')}/src"
        for file in sorted((source / package).rglob("*.py")):
            trees[".".join(file.relative_to(source).with_suffix("").parts)] = ast.parse(file.read_text())
    names = {"HoraError", *(name for tree in trees.values() for name in _derived(tree))}
    return [Error(module, text) for module, tree in trees.items() for text in _messages(tree, names)]


def page(root: Path) -> str:
    """The page of all errors, by module."""
    lines, anchors = [LEAD], _anchors(root)
    by_module: dict[str, list[Error]] = {}
    for error in errors(root):
        if error.message.strip("… "):
            by_module.setdefault(error.module, []).append(error)
    for package in PACKAGES:
        lines.append(f"## {package}\n")
        for module, found in by_module.items():
            if module.split(".")[0] == package:
                lines += [f"### {module}\n", "| error | what to do | rule |", "|---|---|---|"]
                lines += dict.fromkeys(
                    f"| {_cell(e.parts[0])} | {_cell(e.parts[1])} | {anchors.get(e.rule, '')} |" for e in found
                )
                lines.append("")
    return "\n".join(lines)


def _derived(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id == "HoraError" for b in node.bases):
            yield node.name


def _messages(tree: ast.Module, names: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names and node.args:
            yield _text(node.args[0])


def _text(node: ast.expr) -> str:
    """A message with an ellipsis for everything that is not literal."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(_text, values))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
    return "…"


def _cell(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
    return re.sub(r"([*_\[\]`$])", r"\\\1", escaped)


def _anchors(root: Path) -> dict[str, str]:
    """A link to every rule of the specification, by its name."""
    headings = re.findall(r"^### (([A-Z]\d+)\..*)$", (root / "docs/spec.md").read_text(), re.MULTILINE)
    slugs = {
        rule: re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading, rule in headings
    }
    return {rule: f"[{rule}](../spec.md#{slug})" for rule, slug in slugs.items()}
