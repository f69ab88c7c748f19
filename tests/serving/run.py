"""Have servers compute what was trained, and write results.json and the table of docs/guide/serving.md.

    python run.py DIRECTORY [ENGINE=COMMAND ...] [-- ARCHITECTURE ...]

The directory is that of prepare.py. The command of the engines ``vllm`` and ``graphs`` is a Python that has them, that
of ``node`` the script by_node.mjs beside its packages; llama.cpp runs in this process. With architectures only their
results are replaced. The exit status says whether anything is wrong.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from serving.table import BOUND, ENGINES, PAGE, RESULTS, filled  # noqa: E402


def main(arguments: list[str]) -> int:
    """Run, write, and say what is wrong."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    folder, commands, names = (
        Path(arguments[0]),
        dict(a.split("=", 1) for a in arguments[1:split]),
        arguments[split + 1 :],
    )
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"versions": {}, "distances": {}}
    for engine, (command, architectures) in ENGINES.items():
        for arch in architectures:
            if (names and arch not in names) or (command is not None and command[0] not in commands):
                continue
            answer = compute(engine, command, commands, folder, arch)
            results["versions"][engine] = answer.get("version", "")
            expected = json.loads((folder / arch / "expected.json").read_text())["log_probs"]
            results["distances"].setdefault(engine, {})[arch] = {
                case: distance(answer["log_probs"].get(case), rows) for case, rows in expected.items()
            }
            results["versions"]["transformers"] = version("transformers")
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
            print(engine, arch, results["distances"][engine][arch], flush=True)
    PAGE.write_text(filled(PAGE.read_text()))
    worst = [d for by_arch in results["distances"].values() for row in by_arch.values() for d in row.values()]
    return int(any(d is None or d > BOUND for d in worst))


def compute(engine: str, command: Any, commands: dict[str, str], folder: Path, arch: str) -> dict[str, Any]:
    """What an engine computes for one architecture; nothing if it fails."""
    if command is None:
        return by_llama_cpp(folder / arch)
    runner, *arguments = command
    script = [commands[runner]] if runner == "node" else [commands[runner], str(HERE / f"by_{runner}.py")]
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [*(["node"] if runner == "node" else []), *script, *arguments, str(folder), arch],
        env=clean,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return {"log_probs": {}}
    return {"version": node_version(script[0]) if runner == "node" else ""} | json.loads(done.stdout.splitlines()[-1])


def by_llama_cpp(folder: Path) -> dict[str, Any]:
    """llama.cpp as a server, where each request chooses its adapter."""
    from serving.llama_cpp import LlamaCpp

    expected = json.loads((folder / "expected.json").read_text())
    adapters = [case for case in expected["log_probs"] if case != "base"]
    server = LlamaCpp(folder / "base.gguf", [folder / "gguf" / f"{case}.gguf" for case in adapters])
    rows = {}
    for case in expected["log_probs"]:
        scales = {number: float(name == case) for number, name in enumerate(adapters)}
        rows[case] = [server.log_probs(tokens, scales).tolist() for tokens in expected["prompts"]]
    return {"version": version("xllamacpp"), "log_probs": rows}


def node_version(script: str) -> str:
    """Version of the package beside a script."""
    package = Path(script).parent / "node_modules/node-llama-cpp/package.json"
    return str(json.loads(package.read_text())["version"])


def distance(found: Any, expected: Any) -> float | None:
    """Largest difference of log-probabilities, None where there are none."""
    if found is None:
        return None
    return float(f"{max(np.abs(np.subtract(a, b)).max() for a, b in zip(found, expected, strict=True)):.1e}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
