"""Who may import whom: hora_spec stands on no framework, the backends never meet, hora_bench is at the end."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCH = {"torch", "torchvision", "peft", "transformers", "accelerate"}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "equinox", "qwix"}
FORBIDDEN = {
    "hora_spec": TORCH | JAX | {"timm", "hypothesis", "hora_torch", "hora_jax", "hora_bench"},
    "hora_torch": JAX | {"timm", "hypothesis", "hora_jax", "hora_bench"},
    "hora_jax": TORCH | {"timm", "hypothesis", "hora_torch", "hora_bench"},
    "hora_bench": {"hypothesis"},
}
MAY_IMPORT_HYPOTHESIS = "hora_spec.testing"
DISTRIBUTIONS = {
    "PIL": "pillow",
    "markdown_it": "markdown-it-py",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}


def imports(source: str, *, at_run_time: bool = False) -> set[str]:
    """Top-level names of the modules that Python source imports, inside functions too."""
    names = set()
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if at_run_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).partition(".")[0])
    return names


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """Dotted name and file of each module of a package."""
    source = ROOT / "packages" / package.replace("_", "-") / "src"
    for file in sorted((source / package).rglob("*.py")):
        parts = file.relative_to(source).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), file


def loaded_after_importing(names: list[str], path: Path | None = None) -> set[str]:
    """Top-level modules that are loaded in a fresh interpreter once ``names`` are imported."""
    # an installation of hora-torch alone has no torchvision, whose import fails on some builds of torch
    lines = ["import sys; sys.modules['torchvision'] = None", *(f"import {name}" for name in names)]
    if path is not None:
        lines.insert(1, f"sys.path.insert(0, {str(path)!r})")
    lines.append("print(*{name.partition('.')[0] for name, module in sys.modules.items() if module})")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("package", FORBIDDEN)
def test_sources_name_no_forbidden_module(package):
    for name, file in modules(package):
        forbidden = FORBIDDEN[package] - ({"hypothesis"} if name.startswith(MAY_IMPORT_HYPOTHESIS) else set())
        assert not (found := imports(file.read_text()) & forbidden), f"{name} imports {found}"


@pytest.mark.parametrize("package", ["hora_spec", "hora_torch", "hora_jax"])
def test_importing_a_package_loads_no_forbidden_module(package):
    names = [name for name, _ in modules(package) if "__main__" not in name and MAY_IMPORT_HYPOTHESIS not in name]
    assert package in names
    assert not loaded_after_importing(names) & FORBIDDEN[package]


def test_importing_hora_jax_loads_little_beside_jax():
    """Flax alone would cost two seconds, for people who do not use it."""
    more = loaded_after_importing(["hora_jax"]) - loaded_after_importing(["jax"]) - sys.stdlib_module_names
    assert more == {"hora_jax", "hora_spec", "einops", "jaxtyping", "safetensors"}


@pytest.mark.parametrize("package", ["hora_spec", "hora_torch", "hora_jax"])
def test_no_public_name_hides_a_module(package):
    """`package.name` is the module that ``import package.name`` loads, or nothing."""
    public = importlib.import_module(package)
    own = [name.removeprefix(f"{package}.") for name, _ in modules(package) if name.count(".") == 1]
    assert own
    for name in own:
        assert inspect.ismodule(getattr(public, name, inspect)), f"{package}.{name} is a module and something else"


@pytest.mark.parametrize("package", FORBIDDEN)
def test_sources_import_only_declared_dependencies(package):
    with (ROOT / "packages" / package.replace("_", "-") / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = project.get("optional-dependencies", {}).values()
    declared = [*project["dependencies"], *(line for extra in extras for line in extra)]
    allowed = {re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-") for requirement in declared}
    for name, file in modules(package):
        needed = imports(file.read_text(), at_run_time=True) - set(sys.stdlib_module_names) - {package}
        needed = {DISTRIBUTIONS.get(module, module.replace("_", "-")) for module in needed}
        assert needed <= allowed, f"{name} imports {needed - allowed}, which pyproject.toml does not declare"


def test_meta_a_hidden_import_is_seen():
    assert imports("def f():\n    from timm.models import vit\n    import jax.numpy as jnp") == {"timm", "jax"}
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nelse:\n    import jax"
    assert imports(guarded) == {"typing", "torch", "jax"}
    assert imports(guarded, at_run_time=True) == {"typing", "jax"}


def test_meta_a_loaded_module_is_seen(tmp_path):
    (tmp_path / "offender.py").write_text("import timm_stand_in")
    (tmp_path / "timm_stand_in.py").touch()
    assert {"offender", "timm_stand_in"} <= loaded_after_importing(["offender"], tmp_path)
    assert "timm_stand_in" not in loaded_after_importing(["json"], tmp_path)


@pytest.mark.parametrize("package", ["hora_spec", "hora_torch", "hora_jax"])
def test_text_files_name_their_encoding(package):
    """Elsewhere than on Linux and macOS it is not UTF-8 by itself."""
    for name, file in modules(package):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            function = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if function.rpartition(".")[2] in ("open", "read_text", "write_text") and function != "os.open":
                binary = any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in node.args[1:2])
                named = any(keyword.arg == "encoding" for keyword in node.keywords)
                assert binary or named, f"{name}: {ast.unparse(node)}"
