"""Finished pieces of an experiment on disk, so that a killed run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hora_bench.cache import needs_room


class Journal:
    """JSON lines of ``[key, value]``; a last line cut by a kill is dropped.

    Parameters
    ----------
    path
        The file, made with the first piece; None keeps nothing.

    Examples
    --------
    >>> journal = Journal(None)
    >>> journal.once({"seed": 0}, lambda: 3), journal.once({"seed": 0}, lambda: 4)
    (3, 3)
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._values: dict[str, Any] = {}
        if path is not None and path.exists():
            lines = path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            if whole != lines:
                path.write_text("".join(whole))
            self._values = {json.dumps(key): value for key, value in map(json.loads, whole)}

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """The value kept for `key`, or computed and kept now; both JSON values."""
        name = json.dumps(key)
        if name not in self._values:
            self._values[name] = compute()
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with needs_room(self._path), self._path.open("a") as lines:
                    lines.write(json.dumps([key, self._values[name]]) + "\n")
        return self._values[name]

    def remove(self) -> None:
        """Delete the file: the experiment is complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
