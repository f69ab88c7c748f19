"""Processes that write adapters and are killed, or write at the same time; exit code 0 if nothing was torn.

python killed_writers.py kill_saves|kill_exports|race DIRECTORY ROUNDS
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
from hora_spec import (
    Adapter,
    AdapterLayer,
    AdapterSpec,
    HoraError,
    Layout,
    ProjectionShape,
    Site,
    export_lora,
    load_adapter,
    param_shapes,
    save_adapter,
)
from safetensors.numpy import load_file

SITE = Site("attn.q_proj", "weight", (64, 64), Layout(), ProjectionShape(4, 16, 64))


def adapter(number):
    """An adapter that tells its number twice: by its alpha, which is in the config, and by its tensors."""
    layer = AdapterLayer(AdapterSpec(4, alpha=float(number)), {"q": SITE}, {})
    params = {key: np.full(shape, number, np.float32) for key, shape in param_shapes(layer.spec, layer.shape).items()}
    return Adapter({"attn": AdapterLayer(layer.spec, layer.sites, params)})


def number(path):
    """The number of the adapter in a directory, which must be whole."""
    layer = load_adapter(path).layers["attn"]
    values = {float(x) for array in layer.params.values() for x in np.unique(array)}
    assert values == {layer.spec.alpha}, f"alpha {layer.spec.alpha} beside tensors of {values}"
    return int(layer.spec.alpha)


def start(write, *args):
    """A process that calls `write` and ends, with exit code 0 if that raised nothing."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            write(*args)
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    return process


def kill(process, seconds):
    """End a process without any notice to it."""
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def save_on(path, first):
    """Save one adapter after another into a directory, for ever."""
    while True:
        save_adapter(path, adapter(first))
        first += 1


def kill_saves(path, rounds):
    """Each killed save leaves the adapter before it or its own; a directory that was empty may hold none."""
    draw, written = random.Random(0), 0
    for i in range(rounds):
        target = path / str(i // 4)
        if i % 4 == 0:
            written = 0
        kill(start(save_on, target, written + 1), draw.uniform(0, 0.01))
        try:
            found = number(target)
        except HoraError:
            if written:
                raise
            continue
        assert found >= written, f"adapter {found} after {written}"
        written = found
    save_adapter(target, adapter(10**6))
    assert number(target) == 10**6
    assert len(os.listdir(target)) == 2


def export_on(path):
    """Export into one new directory after another, for ever."""
    i = 0
    while True:
        export_lora(adapter(3), path / str(i))
        i += 1


def kill_exports(path, rounds):
    """Each killed export is whole, or can be repeated in the same directory."""
    draw = random.Random(1)
    for i in range(rounds):
        target = path / str(i)
        target.mkdir()
        kill(start(export_on, target), draw.uniform(0, 0.01))
        for one in target.iterdir():
            if not (one / "adapter_config.json").exists():
                export_lora(adapter(3), one)
            assert len(load_file(one / "adapter_model.safetensors")) == 2


def save_some(path, first, rounds):
    """Save `rounds` adapters."""
    for i in range(first, first + rounds):
        save_adapter(path, adapter(i))


def race(path, rounds):
    """Two processes save into one directory; each read meanwhile, and the last one, finds one adapter."""
    save_adapter(path, adapter(1))
    running = {start(save_some, path, first, rounds) for first in (10, 10_000)}
    while running:
        number(path)
        for process in list(running):
            ended, status = os.waitpid(process, os.WNOHANG)
            assert status == 0, "a writer failed"
            running -= {ended}
    assert number(path) in (9 + rounds, 9_999 + rounds)
    assert len(os.listdir(path)) == 2


if __name__ == "__main__":
    {"kill_saves": kill_saves, "kill_exports": kill_exports, "race": race}[sys.argv[1]](
        Path(sys.argv[2]), int(sys.argv[3])
    )
