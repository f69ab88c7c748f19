"""Each recipe as a notebook in results/notebooks/, made and run: ``python .ci/notebooks.py [NAME ...]``."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".ci"))

import print_recipes  # noqa: E402
from pages import recipes  # noqa: E402

NOTEBOOKS = ROOT / "results/notebooks"


def cells(script: Path, arguments: list[str]) -> str:
    """A script in jupytext's percent format: what it says of itself, one cell for each function, and the call."""
    text = script.read_text()
    tree, lines = ast.parse(text), text.splitlines()
    doc = (ast.get_docstring(tree) or "").splitlines()
    parts = ["\n".join(["# %% [markdown]", *(f"# {line}".rstrip() for line in (f"# {doc[0]}", *doc[1:]))])]
    before, apart = tree.body[0].end_lineno, True
    for node in tree.body[1:]:
        body = "\n".join(lines[before : node.end_lineno]).strip("\n")
        if isinstance(node, ast.If):  # if __name__ == "__main__"
            body = "\n".join(
                [f"sys.argv[1:] = {arguments!r}"] * bool(arguments) + [ast.unparse(each) for each in node.body]
            )
        alone = isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If)
        parts.append(f"# %%\n{body}" if alone or apart else body)
        before, apart = node.end_lineno, alone
    return "\n".join(parts) + "\n"


def main(names: list[str]) -> None:
    """Make and run those of some names, or all; a script that is launched in several processes is none."""
    import jupytext
    from nbclient import NotebookClient

    NOTEBOOKS.mkdir(parents=True, exist_ok=True)
    for script in recipes.scripts(ROOT):
        if script.stem in print_recipes.LAUNCHED or (names and script.stem not in names):
            continue
        with print_recipes.prepared(script) as (folder, given, env):
            notebook = jupytext.reads(cells(script, given), "py:percent")
            NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}}).execute(env=env)
        jupytext.write(notebook, NOTEBOOKS / f"{script.stem}.ipynb")
        print(f"{script.stem}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells ran", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
