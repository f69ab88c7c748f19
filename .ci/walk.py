"""Run the commands of docs/start/served.md as they stand there, in an empty folder: ``python .ci/walk.py PyTorch JAX``.

The base is taken from hora-bench's assets, where the page takes it from the hub: they are the same model.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/start/served.md"
FRAMEWORKS, SERVERS = ("PyTorch", "JAX"), ("transformers", "vLLM")
DOWNLOAD = "hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir base"
PATIENCE = " --fail --retry 200 --retry-all-errors --retry-delay 3"  # the server of the line before is still loading


def commands(text: str, framework: str) -> list[str]:
    """Lines of all ``sh`` fences that stand in no tab, or in that of a framework or of a server."""
    found, tab, inside = [], None, False
    for line in text.splitlines():
        if named := re.match(r'=== "(.+)"$', line):
            tab = named[1]
        elif line and not line.startswith("    "):
            tab = None if not inside else tab
        if line.strip().startswith("```"):
            inside = line.strip() == "```sh"
        elif inside and tab in (None, framework, *SERVERS):
            found.append(line.strip())
    return found


def script(lines: list[str], base: Path) -> str:
    """The same for a shell that stops at what fails; a server runs beside what follows it."""
    made = ["set -ex"]
    for line in lines:
        if line == DOWNLOAD:
            line = f"cp -r '{base}' base"
        elif line.startswith("curl "):
            line += PATIENCE
        made.append(f"{line} > server.log 2>&1 &" if " serve " in line else line)
    return "\n".join(made)


def main(frameworks: list[str]) -> int:
    """Walk as each newcomer would; the number of those who did not arrive."""
    from hora_bench import assets

    base, lost = assets.find("smollm2-135m").get(), 0
    for framework in frameworks or FRAMEWORKS:
        with tempfile.TemporaryDirectory() as folder:
            os.symlink(ROOT / "packages", Path(folder, "packages"))
            shell = ["bash", "-c", script(commands(PAGE.read_text(), framework), base)]
            own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
            walk = subprocess.Popen(
                shell, cwd=folder, env=own, start_new_session=True, stdout=subprocess.PIPE, text=True
            )
            try:
                printed = walk.communicate()[0]
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(walk.pid, signal.SIGTERM)  # the server, and whatever an interrupt leaves
            arrived = walk.returncode == 0 and '"content":"' in printed
            print(printed, f"\n{framework}: {'served' if arrived else 'LOST'}", flush=True)
            lost += not arrived
    return lost


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
