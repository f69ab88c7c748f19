"""The recipes of docs/guide/jax-libraries.md, read out of the page: each library's model is adapted, and verified."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs/guide/jax-libraries.md"
FENCE = re.compile(r'^```python title="([^"]*)"(?: after="([^"]*)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)
IMPORT = re.compile(r"^ *(?:import|from) (\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Recipe:
    title: str
    after: str
    code: str


RECIPES = {
    title: Recipe(title, after or "Every recipe", code) for title, after, code in FENCE.findall(PAGE.read_text())
}
VERIFIED = [title for title, recipe in RECIPES.items() if "verified = " in recipe.code]


def run(title: str, names: dict, library) -> dict:
    """The names that a recipe leaves behind, after those it builds on; skipped without its libraries."""
    recipe = RECIPES[title]
    for name in IMPORT.findall(recipe.code):
        library(name)
    if title != recipe.after:
        run(recipe.after, names, library)
    exec(compile(recipe.code, f"{PAGE.name}: {title}", "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries' own making
@pytest.mark.filterwarnings("ignore:jax.numpy:UserWarning")
@pytest.mark.parametrize("title", VERIFIED)
def test_a_model_of_a_library_is_adapted_without_dense_uses(title, library, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    found = run(title, {}, library)["verified"]
    assert found.ok, str(found)
    assert found.uses.low_rank
    assert not found.uses.dense, str(found)


def test_every_code_block_of_the_page_is_run():
    text = PAGE.read_text()
    assert text.count("```python") == len(RECIPES)
    others = set(RECIPES) - set(VERIFIED)
    assert others == {"Every recipe", "tunix, PeftTrainer", "tunix, Sampler"}  # test_tunix.py runs the last two
    assert len(VERIFIED) >= 10
