"""``python -m hora_spec.goldens`` rebuilds the stored cases and proves them unchanged; ``--write DIR`` makes others."""

import argparse
from pathlib import Path

from hora_spec.goldens import VERSION, load_goldens
from hora_spec.goldens.build import first_version, verify, write


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m hora_spec.goldens", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the cases of the corpus to a new folder")
    folder = parser.parse_args(arguments).write
    if folder is not None:
        goldens = first_version()
        write(folder, goldens)
        print(f"{len(goldens)} goldens written to {folder}")
        return
    for version in range(1, VERSION + 1):
        results = [verify(golden) for golden in load_goldens(version).values()]
        exact, worst = sum(same for same, _ in results), max(ratio for _, ratio in results)
        print(
            f"v{version}: {len(results)} of {len(results)} goldens unchanged, {exact} of them bit for bit; "
            f"worst difference {worst:.2g} of the float64 bound"
        )


if __name__ == "__main__":
    main()
