"""What the documentation site is made of: pages from source, parsers, results and scripts."""

import ast
import json
import re
from importlib import import_module
from importlib.metadata import requires
from pathlib import Path

import jinja2
import pytest
import yaml
from packaging.requirements import Requirement

from .test_documents import ROOT, SITE


def test_the_readme_says_what_result_files_say():
    text = (ROOT / "README.md").read_text()
    assert text == SITE.chooser.readme(ROOT), "results have changed: python .ci/site.py readme"


def test_every_error_of_the_source_is_on_the_page():
    found = SITE.errors.errors(ROOT)
    sources = "".join(file.read_text() for file in ROOT.glob("packages/*/src/**/*.py"))
    raised = len(re.findall(r"\bHoraError\(\s*f?[\"']", sources))
    assert len([error for error in found if error.message.strip("… ")]) >= 0.97 * raised > 300
    assert any("unexpected keyword argument" in error.message for error in found)  # of a derived class


def test_rules_that_errors_cite_are_linked():
    text = SITE.errors.page(ROOT)
    for error in SITE.errors.errors(ROOT):
        assert not error.rule or f"[{error.rule}](../spec.md#{error.rule.lower()}-" in text


def test_each_family_on_the_page_was_compiled_and_sharded():
    """And nothing is wrong; where a library does not do it with LoRA either, the page says so."""
    results = json.loads((ROOT / "packages/hora-torch/families/scale.json").read_text())["families"]
    assert sorted(results) == sorted(name for names in SITE.support.FAMILIES.values() for name in names.split())
    for name, answers in results.items():
        assert set(answers) == set(SITE.support.SCALE), name
        assert all(answer == "ok" or answer.endswith("(LoRA too)") for answer in answers.values()), (name, answers)
    assert "| torch.compile | FSDP2 |" in SITE.support.page(ROOT)


def test_notebooks_are_cells_of_the_scripts_and_call_them_with_their_arguments(monkeypatch):
    """By their text; `nox -s notebooks` runs them."""
    monkeypatch.syspath_prepend(ROOT / ".ci")
    notebooks = import_module("notebooks")
    for script in SITE.recipes.scripts(ROOT):
        text = notebooks.cells(script, ["base", "out"])
        code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        made, written = ast.parse(code).body, ast.parse(script.read_text()).body[1:]
        main = isinstance(written[-1], ast.If)
        assert [ast.dump(node) for node in made[: len(written) - main]] == [
            ast.dump(n) for n in written[: -1 if main else None]
        ]
        assert ("sys.argv[1:] = ['base', 'out']" in text) == main
        assert text.startswith("# %% [markdown]\n# # ")


@pytest.mark.parametrize("framework", ["PyTorch", "JAX"])
def test_the_walk_to_a_served_model_has_all_that_it_needs(framework, monkeypatch):
    """By its words; `nox -s walk` runs it."""
    monkeypatch.syspath_prepend(ROOT / ".ci")
    walk = import_module("walk")
    lines = walk.commands(walk.PAGE.read_text(), framework)
    (train,) = [line for line in lines if "examples/" in line]
    asked = {line.split("hora-")[1].split("/")[0] for line in lines if line.startswith("python packages/")}
    assert (ROOT / train.split()[1]).is_file()
    assert asked == {{"PyTorch": "torch", "JAX": "jax"}[framework]}
    assert lines.index(walk.DOWNLOAD) < lines.index(train)
    kinds = [line.split()[1] for line in lines if line.startswith("hora ")]
    assert kinds == ["inspect", "merge", "verify", "export-lora"]
    assert [line.split()[0] for line in lines if "serve" in line.split() or "curl" in line] == ["transformers", "curl"]
    assert "server.log 2>&1 &" in walk.script(lines, Path("base"))


def test_every_command_is_on_the_page():
    text = SITE.commands.page()
    for command in ("hora inspect", "hora export-gguf", "hora-bench demo", "hora-bench run", "hora-bench assets get"):
        assert f"### {command}\n" in text
    assert "`--for-server`" in text
    assert "| `--tune` |" in text


def test_a_script_that_changed_since_it_was_run_shows_no_output(tmp_path):
    script = tmp_path / "packages/hora-torch/examples/one.py"
    script.parent.mkdir(parents=True)
    script.write_text('"""A title.\n\nA line.\n"""\nprint(1)\n')
    run = {"command": "python one.py", "seconds": 1.0, "machine": "m", "versions": "v", "printed": "printed"}
    fresh = run | {"sha256": SITE.recipes.digest(script)}
    (tmp_path / SITE.recipes.PRINTED).parent.mkdir(parents=True)
    for kept, shown in ((fresh, True), (run | {"sha256": "0"}, False)):
        (tmp_path / SITE.recipes.PRINTED).write_text(json.dumps({"one": kept}))
        page = SITE.recipes.pages(tmp_path)["recipes/one.md"]
        assert page.startswith("# A title\n\nA line.\n")
        assert ("```text\nprinted\n```" in page) == shown


@pytest.mark.parametrize("script", SITE.recipes.scripts(ROOT), ids=lambda path: path.stem)
def test_a_recipe_is_short_and_says_what_it_is(script):
    text = script.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len([line for line in text.split('"""', 2)[2].splitlines() if line.strip()]) <= 40


def test_a_recipe_says_what_it_needs_and_what_is_not_named_comes_along():
    needs = {script.stem: SITE.recipes.needs(script.read_text()) for script in SITE.recipes.scripts(ROOT)}
    assert needs["llama_trainer"] == "pip install ./packages/hora-spec ./packages/hora-torch"
    assert needs["llama_cpp"] == 'pip install "./packages/hora-spec[gguf]" ./packages/hora-torch xllamacpp'
    assert needs["four_bit"].endswith("./packages/hora-torch bitsandbytes")
    assert needs["train_nnx"] == 'pip install ./packages/hora-spec "./packages/hora-jax[flax]"'
    assert needs["equinox_digits"].endswith("./packages/hora-jax equinox optax scikit-learn")
    for package, modules in SITE.recipes.BROUGHT.items():
        name, _, extra = package.partition("[")
        assert modules <= brought(name, extra.rstrip("]")), package


def brought(name: str, extra: str = "") -> set[str]:
    """A distribution, with an extra of it, and all that these ask for."""
    found, left = set(), [(name, extra)]
    while left:
        one, extra = left.pop()
        for line in (requires(one) or []) if one not in found else []:
            asked = Requirement(line)
            if asked.marker is None or asked.marker.evaluate({"extra": extra}):
                left.append((asked.name, ""))
        found.add(one)
    return {one.replace("-", "_") for one in found}


def test_pages_in_the_navigation_exist_and_links_on_made_pages_lead_somewhere(staged):
    for name in pages_of(settings()["nav"]):
        assert (staged / name).is_file(), name
    for place in SITE.generated():
        prose = re.sub(r"^```.*?^```", "", (staged / place).read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", prose):
            assert ((staged / place).parent / target).exists(), f"{place} links to {target}"


ASKED = [
    "install",
    "fsdp",
    "trl",
    "qlora",
    "quantised",
    "maxtext",
    "torch.compile",
    "vllm",
    "llama.cpp",
    "qwix",
    "peft",
]


@pytest.mark.parametrize("asked", ASKED)
def test_what_readers_search_for_is_in_a_heading(asked, staged):
    headings = [line for page in staged.rglob("*.md") for line in page.read_text().splitlines() if line.startswith("#")]
    assert any(asked in heading.lower() for heading in headings)


def settings() -> dict:
    """mkdocs.yml, with the name of a variable in place of its value."""
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!ENV", lambda loader, node: loader.construct_sequence(node))
    return yaml.load((ROOT / "mkdocs.yml").read_text(), loader)


def test_addresses_come_from_the_environment_and_the_workflow_sets_them():
    read = settings()
    variables = {"SITE_URL": read["site_url"], "REPO_URL": read["repo_url"]}
    variables["SITE_VERSIONS"] = read["extra"]["version"]["provider"]
    given = yaml.safe_load((ROOT / ".github/workflows/docs.yml").read_text())["env"]
    for name, value in variables.items():
        assert value == [name, ""]
        assert given[name]


def test_with_an_address_every_page_says_what_it_is_made_from_and_links_lead_to_the_repository(staged, tmp_path):
    address = "https://example.org/somebody/hora"
    SITE.stage(tmp_path, address)
    for place, file in SITE.sources().items():
        text = (tmp_path / place).read_text()
        assert f"[Edit this page]({address}/edit/main/{file.relative_to(ROOT).as_posix()})" in text
        assert "Edit this page" not in (staged / place).read_text()
    linked = [target for page in tmp_path.rglob("*.md") for target in _linked_at(f"{address}/blob/main/", page)]
    assert linked
    for target in linked:
        assert (ROOT / target).exists(), target


def _linked_at(address: str, page: Path) -> list[str]:
    return re.findall(rf"\]\({re.escape(address)}([^)#\s]+)", page.read_text())


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    SITE.stage(folder, "")
    return folder


def pages_of(entries) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    if isinstance(entries, dict):
        return [page for value in entries.values() for page in pages_of(value)]
    return [page for entry in entries for page in pages_of(entry)]


def test_beside_a_link_to_the_site_stands_a_picture_that_the_site_holds(staged, tmp_path):
    """The tags by the template; `nox -s docs` asks the same of the page that it built."""
    card, theme = SITE.card, ROOT / settings()["theme"]["custom_dir"]
    loader = jinja2.ChoiceLoader(
        [jinja2.FileSystemLoader(theme), jinja2.DictLoader({"base.html": "{% block extrahead %}{% endblock %}"})]
    )
    template = jinja2.Environment(loader=loader).get_template("main.html")
    home = {"title": "HoRA", "is_homepage": True}
    for address, expected in (("", "./assets/card.png"), ("https://example.org/hora/", None)):
        config = {"site_url": address, "site_name": "HoRA", "site_description": "words"}
        text = template.render(config=config, page=home, base_url=".")
        assert card.NAMED.findall(text) == 2 * [expected or f"{address}assets/card.png"]
    (tmp_path / "index.html").write_text(text)
    (tmp_path / "assets").mkdir()
    (tmp_path / card.PLACE).write_bytes((staged / card.PLACE).read_bytes())
    assert card.fault(tmp_path) is None
    (tmp_path / card.PLACE).write_bytes(b"no picture")
    assert "1200" in card.fault(tmp_path)
    (tmp_path / "index.html").write_text("")
    assert "must name" in card.fault(tmp_path)


def test_the_first_page_says_whether_to_use_it(staged):
    assert SITE.chooser.box(ROOT) in (staged / "index.md").read_text()


def test_staging_twice_touches_nothing_and_removes_what_is_gone(tmp_path):
    SITE.stage(tmp_path, "")
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone/page.md").write_text("old")
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.md")}
    SITE.stage(tmp_path, "")
    assert not (tmp_path / "gone").exists()
    assert all(file.stat().st_mtime_ns == time for file, time in times.items() if file.exists())


def test_links_to_what_is_not_on_the_site_become_text():
    where = SITE.places()
    page = ROOT / "CONTRIBUTING.md"
    assert SITE.relinked("[spec](docs/spec.md#x)", page, where) == "[spec](../spec.md#x)"
    assert SITE.relinked("[run](run)", page, where) == "run"
    result = next(file for file in where if file.suffix == ".json" and "results" in file.parts)
    text = f"[r](../packages/hora-bench/results/{result.name})"
    assert SITE.relinked(text, ROOT / "docs/benchmarks.md", where) == f"[r](results/{result.name})"


def test_an_entry_for_several_parameters_becomes_one_for_each():
    text = "Title.\n\nParameters\n----------\na, b\n    Both.\nc\n    One.\n\nReturns\n-------\nint, str\n    Two."
    expected = "a\n    Both.\nb\n    Both.\nc\n    One."
    assert SITE.entries.ungrouped(text) == text.replace("a, b\n    Both.\nc\n    One.", expected)


def test_documented_parameters_are_those_of_the_signature():
    """By source, so that a name that is gone from a signature is found in every public docstring."""
    wrong = []
    for file in sorted(ROOT.glob("packages/*/src/**/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (doc := ast.get_docstring(node)):
                wrong += [f"{file.name}: {node.name}: {name}" for name in _unknown(node, doc)]
    assert not wrong


def test_every_setting_has_an_entry_of_its_own():
    """The settings that users look up: none is missing, and none hides in an entry of several."""
    for file, name in (
        ("hora-torch/src/hora_torch/config.py", "HoraConfig"),
        ("hora-spec/src/hora_spec/spec.py", "AdapterSpec"),
    ):
        tree = ast.parse((ROOT / "packages" / file).read_text())
        (node,) = [each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == name]
        section = re.search(r"^Parameters\n-+\n(.*?)(?=^\w+\n-+\n|\Z)", ast.get_docstring(node), re.M | re.S)[1]
        fields = [each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and each.target.id != "_"]
        assert sorted(re.findall(r"^(\S.*)$", section, re.M)) == sorted(fields)


def _unknown(node: ast.FunctionDef | ast.ClassDef, doc: str) -> set[str]:
    section = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[\w ]*\n-+\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    if section is None:
        return set()
    named = {n.strip(" *") for line in re.findall(r"^(\S[^:\n]*)", section[1], re.MULTILINE) for n in line.split(",")}
    if isinstance(node, ast.ClassDef):
        init = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
        if init is None:
            return named - {e.target.id for e in node.body if isinstance(e, ast.AnnAssign)} if _data(node) else set()
        node = init
    args = node.args
    return named - {a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg) if a}


def _data(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(each) for each in node.decorator_list)
