"""Build every family, run the battery on it, and write results.json and docs/guide/families.md.

    python run.py [NAME ...] [--workers 2] [--seconds 120] [--page]

Each family runs alone, so that a crash or a run out of time becomes a row. With names only these rows are replaced;
with --page only the page is written. The exit status says whether anything is wrong.
"""

import argparse
import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hora_bench.torchvision_ops import declare_missing_ops

ROOT = Path(__file__).parents[3]
declare_missing_ops()

import torch  # noqa: E402
from battery import examine  # noqa: E402
from catalogue import FAMILIES  # noqa: E402
from isolation import each_alone  # noqa: E402
from table import faults, page  # noqa: E402
from tiny import NoModelError  # noqa: E402

RESULTS = Path(__file__).parent / "results.json"
PAGE = ROOT / "docs/guide/families.md"
LIBRARIES = ("torch", "transformers", "timm", "diffusers", "peft")


def main() -> int:
    """Run, write, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families; all without")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120.0, help="time of one family")
    parser.add_argument("--page", action="store_true", help="write the page from the results there are")
    options = parser.parse_args()

    rows = json.loads(RESULTS.read_text())["families"] if (options.names or options.page) and RESULTS.exists() else {}
    if not options.page:
        rows |= run(options.names or list(FAMILIES), options.workers, options.seconds)
        ordered = {name: rows[name] for name in FAMILIES if rows.get(name)}
        results = {"versions": {name: version(name) for name in LIBRARIES}, "families": ordered}
        RESULTS.write_text(json.dumps(results, indent=0) + "\n")
    PAGE.write_text(page(json.loads(RESULTS.read_text())))
    return sum(bool(faults(row)) for row in rows.values())


def run(names: list[str], workers: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Rows by family; those that are no models of their own are left out."""
    rows = {}
    for name, answer in each_alone(_row, names, workers=workers, seconds=seconds):
        rows[name] = {"built": f"no: {answer}"} if isinstance(answer, Exception) else answer
        print(f"[{len(rows)}/{len(names)}] {name}: {'; '.join(faults(rows[name])) or 'ok'}", flush=True)
    return rows


def _row(name: str) -> dict[str, Any]:
    """Answers for one family, without those that are ``"ok"``."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        return {key: answer for key, answer in examine(FAMILIES[name]()).items() if answer != "ok"}
    except NoModelError:
        return {}


if __name__ == "__main__":
    sys.exit(min(main(), 1))
