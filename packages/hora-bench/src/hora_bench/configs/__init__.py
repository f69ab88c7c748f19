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
        There is none, or it is no configuration.
    """
    path = Path(__file__).parent / f"{name}.json" if name in NAMES else Path(name)
    if not path.is_file():
        raise HoraError(f"--config is one of {', '.join(NAMES)} or a file, got {name!r}: check the path")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise HoraError(f"a configuration is JSON, got {error} in {path.name}: fix the file") from error
    if not (isinstance(content, dict) and isinstance(content.get("options"), dict)):
        raise HoraError(f"a configuration has a mapping of options, got none in {path.name}: see run --help")
    return content
