"""``python -m hora_spec.goldens`` rebuilds the stored cases and proves them unchanged; ``--write DIR`` makes others."""

import argparse
from pathlib import Path

from hora_spec.errors import HoraError
from hora_spec.goldens import VERSION, load_goldens
from hora_spec.goldens.build import first_version, second_version, verify, write
from hora_spec.goldens.build_stored import built_stored, write_stored
from hora_spec.goldens.stored import FOLDER, StoredGolden, load_stored_goldens, serialized


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m hora_spec.goldens", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="DIR", help="write all cases to new folders in DIR")
    folder = parser.parse_args(arguments).write
    if folder is not None:
        versions = (first_version(), second_version())
        for version, goldens in enumerate(versions, start=1):
            write(folder / f"v{version}", goldens)
        write_stored(folder / FOLDER, (stored := built_stored()).values())
        print(f"{sum(map(len, versions))} goldens and {len(stored)} stored weights written to {folder}")
        return
    for version in range(1, VERSION + 1):
        results = [verify(golden) for golden in load_goldens(version).values()]
        exact, worst = sum(same for same, _ in results), max(ratio for _, ratio in results)
        print(
            f"v{version}: {len(results)} of {len(results)} goldens unchanged, {exact} of them bit for bit; "
            f"worst difference {worst:.2g} of the float64 bound"
        )
    stored, again = load_stored_goldens(), built_stored()
    changed = [name for name in stored.keys() | again.keys() if not _same(stored.get(name), again.get(name))]
    if changed:
        raise HoraError(f"goldens of stored weights never change, got others for {sorted(changed)}: revert (spec L4)")
    print(f"{FOLDER}: {len(stored)} of {len(stored)} stored weights unchanged, bit for bit")


def _same(stored: StoredGolden | None, again: StoredGolden | None) -> bool:
    return stored is not None and again is not None and serialized(stored) == serialized(again)


if __name__ == "__main__":
    main()
