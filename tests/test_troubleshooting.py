"""The page about refusals quotes messages that somebody can meet."""

import inspect
import re
from pathlib import Path

import hora_torch
import pytest
from peft import mixed_model

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/guide/troubleshooting.md"
QUOTED = re.findall(r"^## `(.*)`$", PAGE.read_text(), re.MULTILINE)
ELSEWHERE = {  # where the messages of others are met
    "KeyError: 'HORA'": Path(hora_torch.card.__file__).read_text(),
    "not compatible with the ... PeftMixedModel": inspect.getsource(mixed_model),
}


def test_the_page_quotes_messages():
    assert len(QUOTED) > 5


@pytest.mark.parametrize("message", QUOTED)
def test_every_quoted_message_is_one(message):
    source = ELSEWHERE.get(message) or "\n".join(
        file.read_text() for file in Path(hora_torch.__file__).parent.glob("*.py")
    )
    source = re.sub(r'"\s*f?"', "", source)  # literals that go on in the next line
    for part in message.split(" ... "):
        assert part in source, f"{part!r} is no message (any more)"
