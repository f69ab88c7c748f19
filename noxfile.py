"""The one door: what continuous integration does, a person does.

``nox`` checks everything, ``nox -s demo`` runs the main job, ``nox --list`` shows the rest. Sessions that need
both frameworks share one environment under ``.nox/``, filled again only when requirements change.
"""

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / ".ci"))

from environments import (  # noqa: E402
    PACKAGES,
    PIP_INSTALL,
    PYPROJECT,
    VERSION,
    beside,
    constraints,
    consumers,
    environment,
    everything,
    pins,
    run,
    vllm_environment,
)

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "parity", "docs", "tests"]
nox.options.error_on_missing_interpreters = True

SCOPES = ("spec", "all", "libraries", "jax_libraries")
LIBRARY_TESTS = (
    *("lifetime", "quantized", "quantized_merge", "quantized_training", "subclasses"),
    *("normed_orders", "planning", "row_order", "scales"),  # of diffusers
)
JAX_LIBRARY_TESTS = ("libraries", "tunix", "tunix_exchange")
SOURCES = tuple(f"packages/{name}/src" for name in PACKAGES)

SITE_ENV = {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": os.pathsep.join(str(ROOT / source) for source in SOURCES)}
TEST_ENV = {
    # one thread per process: tests run in one process per core
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # CPU and no model hub: the same results everywhere
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    # what one process compiled, another or a second run need not; most of the JAX tests' time is compiling
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".nox" / "jax-cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}


SCHEMAS = {
    "github-workflows": ".github/workflows/*.yml",
    "dependabot": ".github/dependabot.yml",
    "github-issue-forms": ".github/ISSUE_TEMPLATE/[a-b]*.yml",
    "github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "citation-file-format": "CITATION.cff",
}


@nox.session(python=False)
def lint(session):
    """Style, imports, docstrings (ruff), spelling (codespell), workflows and forms (zizmor, their schemas)."""
    tools = environment(session, "lint", groups=("lint",))
    run(session, tools, "ruff", "check", ".")
    run(session, tools, "ruff", "format", "--check", ".")
    run(session, tools, "codespell")
    run(session, tools, "zizmor", "--offline", "--quiet", ".github")
    for schema, files in SCHEMAS.items():
        paths = map(str, sorted(ROOT.glob(files)))
        run(session, tools, "check-jsonschema", f"--builtin-schema=vendor.{schema}", *paths)


@nox.session(python=False)
def types(session):
    """Static types of everything that is published (ty)."""
    tools = everything(session)
    run(session, tools, "ty", "check", "--python", str(tools.parent), *SOURCES)


@nox.session(python=False)
def parity(session):
    """torch, JAX and the reference agree on full arrays; writes results/parity/parity-report.{md,json}."""
    tools = everything(session)
    run(session, tools, "pytest", "tests/parity", *parallel(), *session.posargs, env=TEST_ENV)


@nox.session(python=False)
def docs(session):
    """Build the documentation site strictly into site/ (``-- serve`` for a preview, ``-- mike ...`` for versions)."""
    built(session, *session.posargs)


def built(session: nox.Session, *command: str) -> None:
    """Stage the pages of the site, and build it or do with it what is asked."""
    tools = environment(session, "docs", groups=("docs",))
    run(session, tools, "python", ".ci/site.py", env=SITE_ENV)
    program, *rest = command if command[:1] == ("mike",) else ("mkdocs", *(command or ("build", "--strict", "--quiet")))
    run(session, tools, program, *rest, env=SITE_ENV)


@nox.session(python=False)
def recipes(session):
    """Run the recipes of the site on real models, and keep what they print (``-- NAME ...`` for some of them)."""
    over_recipes(session, ".ci/print_recipes.py")


@nox.session(python=False)
def notebooks(session):
    """Write the recipes as notebooks into results/notebooks/ and run them (``-- NAME ...`` for some of them)."""
    over_recipes(session, ".ci/notebooks.py", "notebooks")


def over_recipes(session: nox.Session, script: str, *groups: str) -> None:
    """Give a script the names of recipes, in the environment that has the libraries of each."""
    names = {path: path.stem for path in sorted(ROOT.glob("packages/*/examples/*.py"))}
    chosen = {path: name for path, name in names.items() if not session.posargs or name in session.posargs}
    kinds = {name: "trl" if name.startswith("trl_") else path.parts[-3] for path, name in chosen.items()}
    for kind, environment_of, library in (
        ("hora-torch", everything, "libraries"),
        ("hora-jax", everything, "jax-libraries"),
        ("trl", consumers, ""),
    ):
        if own := [name for name, each in kinds.items() if each == kind]:
            binaries = environment_of(session)
            if groups:
                extra = nox.project.dependency_groups(PYPROJECT, *groups)
                run(session, binaries, "python", *PIP_INSTALL, *constraints(), *extra)
            env = TEST_ENV | ({"PYTHONPATH": str(beside(session, binaries, library))} if library else {})
            if "vllm_server" in own:
                env["VLLM"] = str(vllm_environment(session) / "python")
            run(session, binaries, "python", script, *own, env=env)


@nox.session(python=False)
def walk(session):
    """Run the commands of docs/start/served.md, from nothing to a served model (``-- JAX`` for one way)."""
    tools = everything(session)
    torch = ROOT / f".nox/torch-{VERSION}.txt"  # the build that `run` chose
    env = {"PIP_CONSTRAINT": str(torch)} if torch.exists() else {}
    run(session, tools, "python", ".ci/walk.py", *session.posargs, env=env)


@nox.session(python=False)
def docs_screens(session):
    """Build the site, and photograph every top page, wide and narrow, light and dark, into results/screens/; fails on
    sideways scrolling, console messages and requests to elsewhere (``-- PAGE ...`` for some pages).
    """
    built(session)
    tools = environment(session, "screens", groups=("screens",))
    run(session, tools, "python", ".ci/screens.py", *session.posargs)


@nox.session(python=False)
@nox.parametrize("scope", SCOPES, ids=SCOPES)
def tests(session, scope):
    """Unit, golden, property and repository tests: hora-spec on its three dependencies, all packages, hora-torch beside
    the quantisers and optimisers that its users bring along, hora-jax beside the libraries of models.
    """
    if scope == "spec":
        tools = environment(session, "spec", packages=("hora-spec",), groups=("test",))
        run(session, tools, "pytest", "packages/hora-spec", *session.posargs, env=TEST_ENV)
    elif scope == "libraries":
        tools = everything(session)
        env = TEST_ENV | {"PYTHONPATH": str(beside(session, tools, "libraries"))}
        paths = [f"packages/hora-torch/tests/test_{name}.py" for name in LIBRARY_TESTS]
        run(session, tools, "pytest", *paths, *parallel(), *session.posargs, env=env)
    elif scope == "jax_libraries":
        tools = everything(session)
        own = {"PYTHONPATH": str(beside(session, tools, "jax-libraries")), "HORA_TEST_LIBRARIES": "all"}
        paths = [f"packages/hora-jax/tests/test_{name}.py" for name in JAX_LIBRARY_TESTS]
        run(session, tools, "pytest", *paths, *parallel(), *session.posargs, env=TEST_ENV | own)
    else:
        tools = everything(session)
        paths = ("packages", "tests", "--ignore=tests/parity")
        run(session, tools, "pytest", *paths, *parallel(), *session.posargs, env=TEST_ENV)


@nox.session(python=False)
def newest_jax(session):
    """hora-spec and hora-jax on the newest JAX and NumPy that this Python can have, beside the newest libraries."""
    packages = ("hora-spec", "hora-jax")
    groups = ("test", "jax", "jax-newest")
    tools = environment(session, "newest-jax", packages=packages, groups=groups, constrained=False)
    beside_it = ("jax-libraries", *(["maxtext"] if sys.version_info >= (3, 12) else []))
    libraries = (str(beside(session, tools, group, constrained=False)) for group in beside_it)
    path = (*libraries, str(ROOT / "packages/hora-bench/src"))  # hora-bench's models need nothing else
    env = TEST_ENV | {"PYTHONPATH": os.pathsep.join(path), "HORA_TEST_LIBRARIES": "all"}
    paths = [f"packages/{name}" for name in packages]
    run(session, tools, "pytest", *paths, *parallel(), *session.posargs, env=env)


@nox.session(python=False)
def demo(session):
    """The main job: fine-tune a pretrained ViT with HoRA on torch and JAX, merge, export, and report."""
    tools = everything(session)
    run(session, tools, "hora-bench", "demo", *session.posargs)


@nox.session(python=False)
def goldens(session):
    """Rebuild the stored reference cases and prove them unchanged."""
    tools = environment(session, "spec", packages=("hora-spec",), groups=("test",))
    run(session, tools, "python", "-m", "hora_spec.goldens", *session.posargs)


@nox.session(python=False)
def peft_conformance(session):
    """PEFT's own tests, from its source distribution, run on HoraConfig."""
    tools = everything(session)
    extra = nox.project.dependency_groups(PYPROJECT, "conformance")
    run(session, tools, "python", *PIP_INSTALL, *constraints(), *extra)
    run(session, tools, "python", "packages/hora-torch/conformance/run.py", *session.posargs, env=TEST_ENV)


@nox.session(python=False)
def families(session):
    """Tiny random models of all families of transformers, timm, torch.nn and diffusers, tried beside LoRA; writes
    docs/guide/families.md (``-- NAME ...`` for some of them).
    """
    tools = everything(session)
    env = TEST_ENV | {"PYTHONPATH": str(beside(session, tools, "families"))}
    run(session, tools, "python", "packages/hora-torch/families/run.py", *session.posargs, env=env)
    if not session.posargs:
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
        run(session, tools, "python", *launcher, "packages/hora-torch/families/scale.py", env=env)


@nox.session(python=False)
def integrations(session):
    """trl, sentence-transformers, diffusers, lm-eval and accelerate, as they are, with adapters of HoRA."""
    tools = consumers(session)
    options = ("--override-ini=python_files=check_*.py", "--override-ini=filterwarnings=")  # warnings are theirs
    folders = ("packages/hora-torch/integrations", "packages/hora-bench/integrations")
    run(session, tools, "pytest", *folders, *options, *session.posargs, env=TEST_ENV)


@nox.session(python=False)
def serving(session):
    """Servers on tiny models: llama.cpp, vLLM, ONNX Runtime, OpenVINO, MLX, node-llama-cpp, and the commands of
    docs/guide/serving.md as written there; writes its table (``-- llama`` for one architecture).
    """
    tools = everything(session)
    vllm = vllm_environment(session)
    graphs = environment(session, "serving-graphs", groups=("serving-graphs",))
    engines = [f"vllm={vllm / 'python'}", f"graphs={graphs / 'python'}"]
    if shutil.which("npm"):
        folder = ROOT / ".nox/serving-node"
        folder.mkdir(exist_ok=True)
        session.run("npm", "install", "--silent", "--prefix", str(folder), "node-llama-cpp@3.22.1", external=True)
        engines.append(f"node={shutil.copy(ROOT / 'tests/serving/by_node.mjs', folder)}")
    models = ROOT / ".nox/serving-models"
    shutil.rmtree(models, ignore_errors=True)
    run(session, tools, "python", "tests/serving/prepare.py", str(models), env=TEST_ENV)
    run(session, tools, "python", "tests/serving/run.py", str(models), *engines, "--", *session.posargs, env=TEST_ENV)
    servers = [f"vLLM={vllm}", f"MLX={graphs}"]
    if (program := shutil.which("llama-server")) is not None:  # else its earlier result stays
        servers.append(f"llama.cpp={Path(program).parent}")
    run(session, tools, "python", "tests/serving/commands.py", str(models / "guide"), *servers, env=TEST_ENV)


@nox.session(python=False)
def quantised(session):
    """A small model quantised in every known way, adapted beside LoRA; writes docs/guide/quantised.md (``-- NAME ...``
    for some ways).
    """
    tools = everything(session)
    env = TEST_ENV | {"PYTHONPATH": str(beside(session, tools, "libraries"))}
    run(session, tools, "python", "packages/hora-torch/quantised/run.py", *session.posargs, env=env)


@nox.session(python=False)
def capabilities(session):
    """Everything a method of PEFT may do, tried with HoRA and LoRA; writes docs/guide/capabilities.md."""
    tools = everything(session)
    run(session, tools, "python", "packages/hora-torch/capabilities/run.py", *session.posargs, env=TEST_ENV)


@nox.session(python=False)
def mutation(session):
    """Change one thing at a time in hora-torch and hora-jax, and see that a test notices (``-- hora_torch.linear``)."""
    tools = everything(session)
    extra = nox.project.dependency_groups(PYPROJECT, "mutation")
    run(session, tools, "python", *PIP_INSTALL, *constraints(), *extra)
    run(session, tools, "python", "-m", "pytest", "-q", "tests/mutation", env=TEST_ENV)
    run(session, tools, "python", "tests/mutation/run.py", *session.posargs, env=TEST_ENV)


@nox.session(python=False)
@nox.parametrize("backend", ["torch", "jax"], ids=["torch", "jax"])
def bench(session, backend):
    """Time and memory of one backend beside its peers in one process; prints a table of ratios."""
    tools = everything(session)
    for script in sorted((ROOT / f"packages/hora-{backend}/benchmarks").glob("[a-z]*.py")):
        run(session, tools, "python", str(script), *session.posargs)


INSTALLATIONS = {  # what a user may ask for: its program in tests/smoke, and what it must not bring
    "hora-spec": ("try_spec", ("torch", "jax", "hypothesis", "hora_torch", "hora_jax")),
    "hora-torch": ("try_torch", ("jax", "timm", "torchvision", "hypothesis", "hora_jax", "hora_bench")),
    "hora-jax": ("try_jax", ("torch", "flax", "optax", "hypothesis", "hora_torch", "hora_bench")),
    "hora-jax[flax]": ("try_nnx", ("torch", "hypothesis", "hora_torch", "hora_bench")),
    "hora-bench": ("try_bench", ("hypothesis",)),
}


@nox.session(python=False)
def build(session):
    """Source distributions and wheels into dist/, installed and tried in fresh environments, hora-spec's tests run from
    its source distribution (``-- hora-jax`` for one); offline once the wheels of others are in .nox/wheels-*.
    """
    tools = environment(session, "build", groups=("release",))
    dist, wheels = ROOT / "dist", wheels_of_others(session, tools)
    shutil.rmtree(dist, ignore_errors=True)
    for package in PACKAGES:
        run(session, tools, "python", "-m", "build", "--no-isolation", "--outdir", "dist", f"packages/{package}")
    run(session, tools, "twine", "check", "--strict", *map(str, sorted(dist.iterdir())))

    # these folders alone: what was published, or is not pinned, must not stand in for what was built
    offers = ("--no-index", f"--find-links={wheels}", f"--find-links={dist}")
    for requirement in session.posargs or INSTALLATIONS:
        fresh = from_nothing(session, offers, requirement)
        script, absent = INSTALLATIONS[requirement]
        module = requirement.partition("[")[0].replace("-", "_")
        run(session, fresh, "python", "-I", "tests/smoke/alone.py", module, *absent, env=TEST_ENV)
        run(session, fresh, "python", "-I", f"tests/smoke/{script}.py", env=TEST_ENV)
    if not session.posargs:
        fresh = from_nothing(session, offers, "hora-spec", *nox.project.dependency_groups(PYPROJECT, "test"))
        shutil.unpack_archive(next(dist.glob("hora_spec-*.tar.gz")), fresh.parent)
        with session.chdir(next(fresh.parent.glob("hora_spec-*"))):
            run(session, fresh, "pytest", "--quiet", "--import-mode=importlib", "tests", env=TEST_ENV)
    shutil.rmtree(ROOT / ".nox/fresh")


def from_nothing(session: nox.Session, offers, *requirements: str) -> Path:
    """Bin folder of an environment that is made anew and holds only what the requirements bring."""
    folder = ROOT / ".nox/fresh"
    shutil.rmtree(folder, ignore_errors=True)
    session.run(sys.executable, "-m", "virtualenv", "--quiet", str(folder), external=True)
    binaries = folder / ("Scripts" if os.name == "nt" else "bin")
    run(session, binaries, "python", *PIP_INSTALL, *offers, *constraints(), *requirements)
    run(session, binaries, "python", "-m", "pip", "check")
    return binaries


def wheels_of_others(session: nox.Session, tools: Path) -> Path:
    """Folder with wheels of everything that the four packages and their tests ask for, at the pinned versions."""
    folder = ROOT / f".nox/wheels-{VERSION}"
    projects = [nox.project.load_toml(file)["project"] for file in sorted(ROOT.glob("packages/*/pyproject.toml"))]
    asked = {line for project in projects for line in project["dependencies"]}
    asked |= {
        line for project in projects for extra in project.get("optional-dependencies", {}).values() for line in extra
    }
    asked |= {*nox.project.dependency_groups(PYPROJECT, "test")}
    requirements = sorted(line for line in asked if not line.startswith("hora-"))
    digest = hashlib.sha256(repr((sys.version, requirements, [file.read_bytes() for file in pins()])).encode())
    stamp = folder / "complete.sha256"
    if not (stamp.exists() and stamp.read_text() == digest.hexdigest()):
        shutil.rmtree(folder, ignore_errors=True)
        command = ("-m", "pip", "wheel", "--quiet", f"--wheel-dir={folder}")
        run(session, tools, "python", *command, *constraints(), *requirements)
        stamp.write_text(digest.hexdigest())
    return folder


def parallel() -> tuple[str, ...]:
    """Options of pytest for one process per core."""
    return ("--numprocesses=logical", "--maxprocesses=8", "--dist=worksteal")
