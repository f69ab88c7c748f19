"""Settings of larger runs as files: options of ``hora-bench run``, and the architecture for ``--dry-run``."""

import json
from pathlib import Path
from typing import Any

from hora_spec import HoraError

NAMES = ("llama-7b", "llama-13b")


def read(name: str) -> dict[str, Any]:
    """A configuration by name or path: ``description``, ``options`` and, for a dry run, ``architecture``.

    Raises
    ------
    HoraError
        There is none.
    """
    path = Path(__file__).parent / f"{name}.json" if name in NAMES else Path(name)
    if not path.is_file():
        raise HoraError(f"--config is one of {', '.join(NAMES)} or a file, got {name!r}: check the path")
    return json.loads(path.read_text())
