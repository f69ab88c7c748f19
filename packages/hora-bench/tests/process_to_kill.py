# ruff: noqa: E402, F401
"""What a process of `test_ten_kills_end_in_the_same_file` does; everything is imported before it is forked."""

import signal
import sys
from itertools import count

from hora_bench.torchvision_ops import declare_missing_ops

declare_missing_ops()

import hora_bench.backends.jax
import hora_bench.backends.jax_methods
import hora_bench.backends.torch
import hora_bench.backends.torch_methods
import hora_jax.nnx
import hora_torch
import timm
from hora_bench import run as runs


def train(asked, task, out, moment, at, waits, told):
    """Run; tell when the `moment`-th event comes, a step or a file of the run that is touched, and wait for the end.

    With `at`, that event or the next of this name.
    """
    events, said = count(1), []

    def passed(event):
        if next(events) >= moment > 0 and not said and at in ("", event):
            said.append(event)
            told.send(event)
            if waits:
                signal.pause()

    sys.addaudithook(lambda event, args: passed(event) if args and str(args[0]).startswith(str(out)) else None)
    runs.run(asked, task, out, command="test", progress=lambda *step: passed("step"), every_s=0.0)
