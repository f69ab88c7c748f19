"""Makes torchvision importable where its compiled extension does not match the installed torch.

timm needs torchvision; a torchvision wheel built for CUDA on a CPU-only torch raises ``operator torchvision::nms
does not exist`` at import, and takes transformers and peft down with it (seen with torchvision 0.28). Nothing here
uses those operators, so declaring their schemas is enough. Call before anything imports torchvision.
"""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@cache
def declare_missing_ops() -> Any:
    """Declare `nms` and `qnms` if torchvision's extension cannot be loaded.

    Returns
    -------
    torch.library.Library or None
        The declarations, kept alive by this function's cache; None when torchvision works, is absent, or is
        already imported.
    """
    found = importlib.util.find_spec("torchvision")
    if "torchvision" in sys.modules or found is None or found.origin is None:
        return None
    import torch

    if hasattr(torch.ops.torchvision, "nms"):
        return None
    for extension in Path(found.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            break
        else:
            return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}{SCHEMA}")
    return library
