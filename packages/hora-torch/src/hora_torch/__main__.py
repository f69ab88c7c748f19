"""Run a program that knows the method: ``python -m hora_torch -m MODULE ...`` or ``python -m hora_torch SCRIPT ...``.

PEFT knows a method from outside only where it was imported, and tools such as lm_eval or ``trl.scripts.sft`` import
nothing that they do not know. Programs that start others want it in those: ``torchrun -m hora_torch -m MODULE ...``,
``accelerate launch -m hora_torch SCRIPT ...``.
"""

import os
import runpy
import sys
from collections.abc import Sequence

import hora_torch  # which registers the method

_USAGE = "usage: python -m hora_torch (-m MODULE | SCRIPT) [ARGUMENT ...]"


def main(arguments: Sequence[str]) -> int:
    """Run a module or a script as Python does, with its own ``sys.argv``; the status if there is none to run."""
    rest = list(arguments)
    as_module = rest[:1] == ["-m"]
    target, *own = (rest[1:] if as_module else rest) or [""]
    if not target or target.startswith("-"):
        print(_USAGE, f"HoRA {hora_torch.__version__} is then known to PEFT.", sep="\n", file=sys.stderr)
        return 2
    sys.argv = [target, *own]
    if as_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(target))
        runpy.run_path(target, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
