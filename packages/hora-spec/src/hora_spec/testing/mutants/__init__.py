"""Mutants: backends with one deliberate mistake each. Checks that let one live prove nothing.

A mutant wraps an honest backend, any of them, and changes what goes in or comes out:

>>> from hora_spec.testing import REFERENCE
>>> from hora_spec.testing.mutants import MUTANTS, survivors
>>> survivors(REFERENCE, MUTANTS[:3])
()
"""

from collections.abc import Iterable

from hora_spec.testing.backend import Backend
from hora_spec.testing.case import Case, corpus
from hora_spec.testing.mutants import assembly, generation, gradients, linear
from hora_spec.testing.mutants.mutant import Mutant, killer
from hora_spec.testing.mutants.rewire import rewired

__all__ = ["MUTANTS", "Mutant", "killer", "rewired", "survivors"]

MUTANTS: tuple[Mutant, ...] = tuple(
    value
    for module in (generation, assembly, linear, gradients)
    for value in vars(module).values()
    if isinstance(value, Mutant)
)
"""Every mistake that the checks must catch."""


def survivors(
    backend: Backend, mutants: Iterable[Mutant] = MUTANTS, cases: Iterable[Case] | None = None
) -> tuple[Mutant, ...]:
    """Mutants, planted in `backend`, that no case of the corpus kills."""
    cases = corpus() if cases is None else tuple(cases)
    return tuple(mutant for mutant in mutants if killer(mutant, backend, cases) is None)
