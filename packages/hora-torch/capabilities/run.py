"""Write docs/guide/capabilities.md: what HoRA and LoRA can do, found by trying."""

from pathlib import Path

from hora_bench.torchvision_ops import declare_missing_ops

ROOT = Path(__file__).parents[3]
declare_missing_ops()

from judge import REFUSALS, write  # noqa: E402

if __name__ == "__main__":
    write(ROOT / "docs/guide/capabilities.md")
    for (method, question), error in REFUSALS.items():
        print(f"{method}, {question}: {error.splitlines()[0][:160]}")
