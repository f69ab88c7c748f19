"""Build every family, run the battery on it and write results.json and the table of the documentation.

    python run.py [NAME ...] [--seconds 120] [--workers 2]

Each family runs in a process of its own, forked after the libraries are imported: a crash or a run out of time becomes
a row. With names, only these rows are replaced.
"""

import argparse
import json
import multiprocessing
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from battery import examine
from catalogue import FAMILIES
from tiny import NoModelError

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"


def main() -> None:
    """Run, write, print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families; all without")
    parser.add_argument("--seconds", type=float, default=120.0, help="time for one family")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    names = options.names or list(FAMILIES)
    rows = json.loads(options.results.read_text()) if options.names and options.results.exists() else {}
    for name, row in examined(names, options.workers, options.seconds):
        print(f"{name}: {row}", flush=True)
        rows[name] = row
    ordered = {name: rows[name] for name in FAMILIES if name in rows and rows[name]["built"] != "none"}
    options.results.write_text(json.dumps(ordered, indent=0, sort_keys=False) + "\n")


def examined(names: list[str], workers: int, seconds: float):
    """Name and row of each family, as they are done."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(names)), {}
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_examine, args=(name, sender))
            process.start()
            sender.close()
            running[name] = process, receiver, time.monotonic() + seconds
        multiprocessing.connection.wait([receiver for _, receiver, _ in running.values()], timeout=1.0)
        for name, (process, receiver, deadline) in list(running.items()):
            if receiver.poll() or not process.is_alive():
                yield name, _received(receiver, process)
            elif time.monotonic() > deadline:
                process.kill()
                yield name, {"built": f"crashed: no answer within {seconds:.0f} s"}
            else:
                continue
            process.join()
            del running[name]


def _received(receiver: Any, process: Any) -> dict[str, Any]:
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return {"built": f"crashed: exit status {process.exitcode}"}


def _examine(name: str, sender: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        row = examine(FAMILIES[name]())
    except NoModelError:
        row = {"built": "none"}
    except Exception as error:
        row = {"built": f"no: {type(error).__name__}: {error}"[:300].replace("\n", " ")}
    sender.send(row)


if __name__ == "__main__":
    main()
