"""Seeds as they are written: lists and ranges."""

from typing import Any

from hora_spec import HoraError


def seeds_of(given: Any) -> tuple[int, ...]:
    """Seeds as a list, or as text such as ``0-19`` or ``0,3,7``.

    Raises
    ------
    HoraError
        The text is no such list, or a seed comes twice.

    Examples
    --------
    >>> seeds_of("0-3,7")
    (0, 1, 2, 3, 7)
    """
    if not isinstance(given, str):
        seeds = tuple(given)
    else:
        ends = [part.strip().partition("-") for part in given.split(",")]
        if not all(low.isdecimal() and (high.isdecimal() or not dash) for low, dash, high in ends):
            raise HoraError(f"seeds are whole numbers and ranges of them, got {given!r}: write 0-19 or 0,1,2")
        seeds = tuple(seed for low, _, high in ends for seed in range(int(low), int(high or low) + 1))
    if not seeds or len(set(seeds)) != len(seeds) or not all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds):
        raise HoraError(f"seeds are different whole numbers, got {given!r}: write 0-19 or 0,1,2")
    return seeds
