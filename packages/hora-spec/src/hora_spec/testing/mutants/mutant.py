"""What a mutant is, and what kills it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hora_spec.errors import HoraError
from hora_spec.testing.backend import Backend
from hora_spec.testing.case import Case

Check = Callable[[Backend, Case, str], float]
Plant = Callable[[Backend], Backend]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A mistake that can be planted in any backend.

    Parameters
    ----------
    name
        What is wrong.
    rule
        The rule of the specification that it breaks.
    check
        The check that must catch it.
    dtype
        The dtype in which it shows.
    plant
        Wraps an honest backend so that it makes the mistake. Only inputs and outputs change, so it works on any.
    """

    name: str
    rule: str
    check: Check
    dtype: str
    plant: Plant


def mutant(rule: str, check: Check, dtype: str = "float32") -> Callable[[Plant], Mutant]:
    """Decorator: a function that plants the mistake that its docstring tells becomes a `Mutant`."""
    return lambda plant: Mutant(str(plant.__doc__).rstrip("."), rule, check, dtype, plant)


def killer(mutant: Mutant, backend: Backend, cases: Iterable[Case]) -> str | None:
    """Message of the first failure of the mutant's check, or None if it survives.

    Raises
    ------
    HoraError
        If there are no cases: nothing would be proven.
    """
    cases = tuple(cases)
    if not cases:
        raise HoraError("a mutant is judged on at least one case, got none: pass hora_spec.testing.corpus()")
    planted = mutant.plant(backend)._replace(name=f"{backend.name} with {mutant.name}")
    for case in cases:
        try:
            mutant.check(planted, case, mutant.dtype)
        except AssertionError as failure:
            return str(failure)
    return None
