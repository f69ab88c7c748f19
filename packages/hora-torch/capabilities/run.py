"""Write docs/guide/capabilities.md: what HoRA and LoRA can do, found by trying."""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))
importlib.import_module("conftest")  # prepares torchvision, which others import

from judge import REFUSALS, write  # noqa: E402

if __name__ == "__main__":
    write(ROOT / "docs/guide/capabilities.md")
    for (method, question), error in REFUSALS.items():
        print(f"{method}, {question}: {error.splitlines()[0][:160]}")
