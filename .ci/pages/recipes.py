"""A page for each script under packages/*/examples: the script itself, and what it printed when it was last run."""

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

PRINTED = "docs/recipes/printed.json"
LEAD = """# Recipes

Complete scripts of at most 40 lines of code. Each page is made from the script in the repository, and shows what
`nox -s recipes` saw it print; one that was changed since it was run shows no output. Models named there are assets of
`hora-bench`: `hora-bench assets get smollm2-135m` fetches one. `nox -s notebooks` makes notebooks of them.
"""


def scripts(root: Path) -> list[Path]:
    """All scripts, by package and name."""
    return sorted(root.glob("packages/*/examples/*.py"))


def digest(script: Path) -> str:
    """What tells whether a script is the one that was run."""
    return hashlib.sha256(script.read_bytes()).hexdigest()


def pages(root: Path) -> dict[str, str]:
    """A page for each script, and their list."""
    runs = json.loads((root / PRINTED).read_text())
    found = scripts(root)
    made = {f"recipes/{script.stem}.md": _page(root, script, runs.get(script.stem)) for script in found}
    lines = [LEAD]
    for framework in ("torch", "jax"):
        lines += [f"## {'PyTorch' if framework == 'torch' else 'JAX'}\n"]
        lines += [f"- [{title(script)}]({script.stem}.md)" for script in found if f"hora-{framework}" in str(script)]
        lines.append("")
    return made | {"recipes/index.md": "\n".join(lines)}


def title(script: Path) -> str:
    """The first line of what a script says of itself."""
    return (ast.get_docstring(ast.parse(script.read_text())) or script.stem).splitlines()[0].rstrip(".")


def _page(root: Path, script: Path, run: dict[str, Any] | None) -> str:
    text = script.read_text()
    doc = ast.get_docstring(ast.parse(text)) or ""
    place = script.relative_to(root).as_posix()
    code = text.split('"""', 2)[2].lstrip("\n")
    rest = "\n".join(doc.splitlines()[1:]).strip()
    lines = [f"# {title(script)}", "", rest, "", f'```python title="{place}"', code.rstrip(), "```", ""]
    if run and run["sha256"] == digest(script) and run["printed"].strip():
        lines += [
            f"Printed by `{run['command']}`, {run['seconds']:.0f} seconds on {run['machine']} ({run['versions']}):",
            "",
            "```text",
            run["printed"].rstrip(),
            "```",
        ]
    return "\n".join(lines) + "\n"
