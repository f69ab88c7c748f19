"""The commands of docs/guide/serving.md, and the folder in which they are run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers

from .adapted import adapted, saved
from .table import PAGE
from .tiny import language_model, write_gguf

PROMPT = "Once upon a time"
"""What the commands ask for, with 8 tokens to be written, each the likeliest."""

_SEED = 23
"""Of an adapter whose text is printable, each token likelier than the next by 0.26 in log-probability."""

_BLOCK = re.compile(
    r"^### (?P<heading>[^\n]+)$|^```(?P<kind>sh|console|py)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Block:
    """Lines of one fence of the guide, in the language `kind`, below a heading."""

    heading: str
    kind: str
    text: str

    @property
    def lines(self) -> list[str]:
        """Its lines."""
        return self.text.splitlines()


def blocks() -> list[Block]:
    """All fences of the guide that hold something to run; ``sh`` is our own commands."""
    found, heading = [], ""
    for match in _BLOCK.finditer(PAGE.read_text()):
        if match["heading"]:
            heading = match["heading"]
        else:
            found.append(Block(heading, match["kind"], match["text"]))
    return found


def own_commands() -> list[str]:
    """Lines that start with ``hora``."""
    return [line for block in blocks() if block.kind == "sh" for line in block.lines]


def begin(folder: Path) -> dict[str, str]:
    """Write what the guide begins with, a base, its GGUF file and an adapter; returns what should be answered.

    Returns
    -------
    dict
        The 8 likeliest tokens after `PROMPT` as text, of the ``base`` and of the ``adapted`` model.
    """
    sizes = {"hidden_size": 128, "head_dim": 32, "initializer_range": 0.15}
    words = tokenizer()
    base = language_model(**sizes)
    model = adapted(language_model(**sizes), "llama", "full", seed=_SEED)
    base.save_pretrained(folder / "base")
    words.save_pretrained(folder / "base")
    write_gguf(folder / "base.gguf", base)
    saved(model, folder / "adapter")
    return {"base": written(base, words), "adapted": written(model, words)}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The tokens of the GGUF file, for transformers: single bytes, and words that no text is cut into."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(128)), "\u2581"]
    names += [f"\u2581word{i}" for i in range(192 - len(names))]
    vocabulary = {name: number for number, name in enumerate(names)}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    result = tokenizers.Tokenizer(model)
    result.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    result.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=result, **special)


def written(model: transformers.PreTrainedModel, words: transformers.PreTrainedTokenizerFast) -> str:
    """What a model writes after `PROMPT`."""
    tokens: Sequence[int] = words(PROMPT)["input_ids"]
    for _ in range(8):
        with torch.no_grad():
            tokens = [*tokens, int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())]
    return words.decode(tokens[-8:])
