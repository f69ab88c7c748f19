"""``python -m hora_spec.testing.mutants`` plants every mistake in the NumPy backends and reports what is caught."""

from hora_spec.testing.backend import REFERENCE
from hora_spec.testing.mutants import MUTANTS, survivors
from hora_spec.testing.vectorized import VECTORIZED


def main() -> None:
    """Entry point; exits with 1 if a mutant survives."""
    failed = False
    for backend in (REFERENCE, VECTORIZED):
        alive = survivors(backend)
        failed |= bool(alive)
        print(f"{backend.name}: {len(MUTANTS) - len(alive)} of {len(MUTANTS)} mutants killed")
        for mutant in alive:
            print(f"  survived: {mutant.name} (spec {mutant.rule}, in {mutant.dtype})")
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
