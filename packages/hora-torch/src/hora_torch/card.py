"""The model card in an adapter directory says how the adapter is loaded: PEFT alone answers with a bare KeyError."""

import os
from pathlib import Path

_HEADING = "## How to load this adapter"


def write_card(directory: str | os.PathLike[str], base_model: str | None) -> None:
    """Add to the ``README.md`` of an adapter directory, which may be absent, what its readers need to know; once."""
    path = Path(directory, "README.md")
    text = path.read_text(encoding="utf-8") if path.is_file() else "---\nlibrary_name: peft\n---\n"
    if _HEADING in text:
        return
    waiting = path.with_name(f"README.md.{os.getpid()}.tmp")
    waiting.write_text(f"{text.rstrip()}\n\n{_section(base_model or 'path-of-the-base-model')}", encoding="utf-8")
    waiting.replace(path)


def _section(base_model: str) -> str:
    return f"""{_HEADING}

Its type is HORA. PEFT knows it once `hora_torch` is imported (`pip install hora-torch`), and answers with
`KeyError: 'HORA'` before.

```python
import hora_torch
from peft import PeftModel
from transformers import AutoModel

model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base_model}"), "path-of-this-directory")
```

Command-line tools know it when they are started by `python -m hora_torch -m MODULE ...`. Servers of LoRA read what
`hora_torch.export_lora(model, "lora")` writes.
"""
