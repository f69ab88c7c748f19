"""The one error that every HoRA package raises for bad input (spec E1)."""


class HoraError(ValueError):
    """Bad input, described as rule, got and fix.

    Every message names the rule that is broken, what was given, and what to do about it. Nothing on disk
    or in memory has changed when it is raised (spec E1, E2).
    """
