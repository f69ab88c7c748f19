"""What every test of the repository needs before the first import of a framework."""

import os
from importlib.util import find_spec
from pathlib import Path

from hypothesis import HealthCheck, settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Shapes come from small tables and values from seeds, so a few draws reach far; a new shape costs JAX a compile.
settings.register_profile(
    "fast",
    derandomize=True,
    deadline=None,
    max_examples=25,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "nightly",
    derandomize=False,
    deadline=None,
    max_examples=500,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fast")  # pytest's --hypothesis-profile=nightly overrides it


def _declare_torchvision_operators():
    """Let torchvision be imported where its compiled operators do not match torch.

    torchvision (0.28) describes ``nms`` to torch even when the library that defines it cannot be loaded, as
    on a CPU build of torch, and its import then fails, with transformers and peft behind it.
    """
    found = find_spec("torchvision")
    if found is None or find_spec("torch") is None:
        return None
    import torch

    if hasattr(torch.ops.torchvision, "nms"):  # declared in the process that this one was forked from
        return None
    for library in Path(found.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(library)
        except OSError:
            declared = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            return declared
    return None


_TORCHVISION = _declare_torchvision_operators()  # the declaration lives as long as this object
