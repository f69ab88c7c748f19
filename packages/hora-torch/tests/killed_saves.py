"""Kills PEFT while it saves an adapter; exit code 0 if what was left was whole or refused each time.

python killed_saves.py DIRECTORY ROUNDS
"""

import os
import random
import signal
import sys
import time

import peft
import torch
from hora_spec import HoraError, load_adapter
from hora_torch import HoraConfig
from torch import nn


class Attention(nn.Module):
    """Enough of an attention to be adapted."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(64, 64)

    def forward(self, x):
        """The query alone."""
        return self.q_proj(x)


def build():
    """An adapted model."""
    config = HoraConfig(r=4, num_heads=4, target_modules=["q_proj"], hora_alpha=1.0)
    return peft.get_peft_model(nn.Sequential(Attention()), config)


def mark(model, number):
    """Make the adapter tell its number twice: by its alpha, which is in the config, and by its tensors."""
    config = model.peft_config["default"]
    config.hora_alpha = config.hora_layers[0]["spec"]["alpha"] = float(number)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(number)


def save_on(model, path, number):
    """Save one adapter after another into a directory, for ever."""
    while True:
        mark(model, number)
        model.save_pretrained(path)
        number += 1


def main(path, rounds):
    """Count what the kills leave."""
    model, draw, whole, number = build(), random.Random(0), 0, 1
    start = time.perf_counter()
    for _ in range(3):
        model.save_pretrained(path)
    once = (time.perf_counter() - start) / 3  # a busy machine saves slowly
    for _ in range(rounds):
        process = os.fork()
        if process == 0:
            save_on(model, path, number)
        time.sleep(draw.uniform(0.5, 5) * once)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        number += 1000
        try:
            (layer,) = load_adapter(path).layers.values()
        except HoraError:
            continue
        whole += 1
        values = {x for array in layer.params.values() for x in array.flat}
        if values != {layer.spec.alpha}:
            sys.exit(f"alpha {layer.spec.alpha} beside tensors of {values}")
    if not whole:
        sys.exit("no save was ever whole")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
