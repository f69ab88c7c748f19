"""A page for each script under packages/*/examples: the script itself, and what it printed when it was last run."""

import ast
import hashlib
import json
import sys
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


BROUGHT = {  # what an installation brings along, of what recipes import
    "hora-torch": {"accelerate", "numpy", "peft", "torch", "transformers"},
    "hora-jax": {"jax", "numpy"},
    "hora-jax[flax]": {"flax", "optax"},
}
CALLED = {"sklearn": "scikit-learn", "tunix": "google-tunix"}
UNSEEN = {"BitsAndBytesConfig": "bitsandbytes"}  # what is imported by another


def needs(text: str) -> str:
    """The command that installs what a script imports, in a clone."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes]
    modules = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    ours = [f"hora-spec{'[gguf]' if 'export_gguf' in text else ''}"]
    ours += ["hora-torch"] * ("hora_torch" in modules or "hora_bench" in modules)
    ours += [f"hora-jax{'[flax]' if {'flax', 'hora_jax.nnx'} & {*modules, *names} else ''}"] * (
        "hora_jax" in modules or "hora_bench" in modules
    )
    ours += ["hora-bench"] * ("hora_bench" in modules)
    brought = set().union(*(BROUGHT.get(each, set()) | BROUGHT.get(each.partition("[")[0], set()) for each in ours))
    others = {CALLED.get(name, name) for name in modules - brought if not name.startswith("hora_")}
    others |= {name for word, name in UNSEEN.items() if word in text}
    local = [f'"./packages/{each}"' if "[" in each else f"./packages/{each}" for each in ours]
    return " ".join(("pip install", *local, *sorted(others)))


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
    lines = [
        f"# {title(script)}",
        "",
        rest,
        "",
        f"Needs, in a clone: `{needs(text)}`.",
        "",
        f'```python title="{place}"',
        code.rstrip(),
        "```",
        "",
    ]
    if run and run["sha256"] == digest(script) and run["printed"].strip():
        lines += [
            f"Printed by `{run['command']}`, {run['seconds']:.0f} seconds on {run['machine']} ({run['versions']}):",
            "",
            "```text",
            run["printed"].rstrip(),
            "```",
        ]
    return "\n".join(lines) + "\n"
