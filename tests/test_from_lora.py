"""The page for those who come from LoRA names every field of LoraConfig and of qwix, and says what is so."""

import dataclasses
import re
from pathlib import Path

import hora_torch
import jax
import peft
import pytest
import torch
from hora_spec import HoraError

FROM_LORA = (Path(__file__).parents[1] / "docs/start/from-lora.md").read_text()
OURS = {field.name for field in dataclasses.fields(hora_torch.HoraConfig)}
LORA = [field.name for field in dataclasses.fields(peft.LoraConfig)]


def lora_rows() -> dict[str, str]:
    """Field of LoraConfig to the second cell of its row."""
    table = FROM_LORA.split("| `LoraConfig` |")[1].split("\n\n")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    return {name: cell.strip() for names, cell in rows for name in re.findall(r"`(\w+)`", names)}


def test_every_field_of_loraconfig_has_its_row():
    assert sorted(lora_rows()) == sorted(LORA)


@pytest.mark.parametrize(("name", "cell"), lora_rows().items())
def test_a_field_of_loraconfig_is_what_its_row_says(name, cell):
    if cell == "refused":
        with pytest.raises(HoraError, match=name):
            hora_torch.HoraConfig(**{name: None})
    else:
        ours = name if cell == "the same" else cell.strip("`")
        assert ours in OURS


def test_every_field_of_qwix_has_its_row():
    qwix = pytest.importorskip("qwix")
    table = FROM_LORA.split("| `qwix.LoraRule` |")[1].split("\n\n")[0]
    named = [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(qwix.LoraRule))


def test_how_much_wider_qwix_starts_a():
    qwix = pytest.importorskip("qwix")
    (initializer,) = [f.default for f in dataclasses.fields(qwix.LoraRule) if f.name == "lora_a_initializer"]
    wide = initializer(jax.random.key(0), (1024, 64)).std()
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(1024, 8)), peft.LoraConfig(r=64, target_modules=["0"])
    )
    (narrow,) = [param.std().item() for name, param in model.named_parameters() if "lora_A" in name]
    (said,) = re.findall(r"qwix's own A starts ([\d.]+) times as wide as PEFT's", FROM_LORA)
    assert float(wide) / narrow == pytest.approx(float(said), rel=0.02)
