"""Run a script as Python does, where torchvision may be of another kind than torch.

python launched.py SCRIPT [ARGUMENT ...]
"""

import runpy
import sys
from importlib.util import find_spec

if find_spec("hora_bench"):
    from hora_bench.torchvision_ops import declare_missing_ops

    declare_missing_ops()

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
