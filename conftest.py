"""What every test of the repository needs before the first import of a framework."""

import os
from importlib.util import find_spec

from hora_spec.testing.profiles import use_fast

os.environ.setdefault("JAX_PLATFORMS", "cpu")
use_fast()

if find_spec("hora_bench"):  # where torch is, it is installed; torchvision may be of another kind than torch
    from hora_bench.torchvision_ops import declare_missing_ops

    declare_missing_ops()
