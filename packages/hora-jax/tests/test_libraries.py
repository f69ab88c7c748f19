"""The recipes of docs/guide/jax-libraries.md, read out of the page: each library's model is adapted, and verified."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
if not (ROOT / "noxfile.py").exists():
    pytest.skip("the page is in the repository", allow_module_level=True)

PAGE = ROOT / "docs/guide/jax-libraries.md"
FENCE = re.compile(r'^```python title="([^"]*)"\n(.*?)^```', re.MULTILINE | re.DOTALL)
IMPORT = re.compile(r"^ *(?:import|from) (\w+)", re.MULTILINE)
RECIPES = dict(FENCE.findall(PAGE.read_text()))
VERIFIED = [title for title, code in RECIPES.items() if "verified = " in code]
LOUD = {"MaxText"}  # warns of what it does not need


def before(title: str) -> str:
    """The block that a block builds on: "tunix, PeftTrainer" on the one above it, others on the first of the page."""
    titles = list(RECIPES)
    return titles[titles.index(title) - 1] if ", " in title else titles[0]


def run(title: str, names: dict, library) -> dict:
    """The names that a recipe leaves behind, after those it builds on; skipped without its libraries."""
    for name in IMPORT.findall(RECIPES[title]):
        library(name)
    if title != before(title):
        run(before(title), names, library)
    exec(compile(RECIPES[title], f"{PAGE.name}: {title}", "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries' own making
@pytest.mark.filterwarnings("ignore:jax.numpy:UserWarning")
@pytest.mark.parametrize(
    "title", [pytest.param(each, marks=[pytest.mark.filterwarnings("ignore")] * (each in LOUD)) for each in VERIFIED]
)
def test_a_model_of_a_library_is_adapted_without_dense_uses(title, library, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
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
