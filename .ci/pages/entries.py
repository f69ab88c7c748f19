"""Docstrings of numpydoc with one entry for each parameter, where they describe several at once."""

import re

NAMES = re.compile(r"^(\w+(?:, \w+)+)$")


def ungrouped(docstring: str) -> str:
    """The docstring with an entry for each of several names that share one."""
    made, entries, parameters = [], [], False
    lines = docstring.splitlines()
    for number, line in enumerate([*lines, ""]):
        heading = lines[number + 1] if number + 1 < len(lines) else ""
        if set(heading) == {"-"}:
            made += _copies(entries)
            entries, parameters = [], line in ("Parameters", "Attributes")
        if parameters and NAMES.match(line):
            made += _copies(entries)
            entries = [line]
        elif entries and (line.startswith("    ") or not line.strip()):
            entries.append(line)
        else:
            made += _copies(entries)
            entries = []
            made.append(line)
    return "\n".join([*made, *_copies(entries)]).rstrip("\n")


def _copies(entry: list[str]) -> list[str]:
    if not entry:
        return []
    return [line for name in entry[0].split(", ") for line in (name, *entry[1:])]
