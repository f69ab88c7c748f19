"""Try every quantised base beside PEFT's LoRA; write results.json and docs/guide/quantised.md.

    python run.py [NAME ...] [--page]

With names only these rows are replaced; with --page only the page is written. The exit status says whether anything is
wrong.
"""

import argparse
import json
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hora_bench.torchvision_ops import declare_missing_ops

ROOT = Path(__file__).parents[3]
declare_missing_ops()

import torch  # noqa: E402
from bases import BASES, SIZES, missing, save_float_model  # noqa: E402
from quantised_table import faults, page  # noqa: E402
from trial import UPDATE, examine  # noqa: E402

RESULTS = Path(__file__).parent / "results.json"
PAGE = ROOT / "docs/guide/quantised.md"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "torchao", "hqq", "optimum-quanto")


def main() -> int:
    """Run, write, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="bases; all without")
    parser.add_argument("--page", action="store_true", help="write the page from the results there are")
    options = parser.parse_args()

    rows = json.loads(RESULTS.read_text())["bases"] if (options.names or options.page) and RESULTS.exists() else {}
    if not options.page:
        rows |= run(options.names or list(BASES))
        results = {
            "versions": {name: version(name) for name in LIBRARIES},
            "width": SIZES["hidden_size"],
            "update": UPDATE,
            "bases": {name: rows[name] for name in BASES},
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(json.loads(RESULTS.read_text())))
    return sum(bool(faults(row)) for row in rows.values())


def run(names: list[str]) -> dict[str, Any]:
    """Rows by base."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        save_float_model(Path(folder))
        for name in names:
            if library := missing(name):
                raise SystemExit(f"{name} needs {library}: install the dependency group `libraries`")
            rows[name] = examine(name, Path(folder))
            print(f"{name}: {'; '.join(faults(rows[name])) or 'ok'}", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(min(main(), 1))
