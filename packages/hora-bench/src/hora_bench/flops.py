"""The one counter of floating-point operations on torch."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _addmm(_: torch.Size, left: torch.Size, right: torch.Size, **__: Any) -> int:
    """FLOPs of ``y += left @ right``: torch's counter (2.13) knows addmm but not the in-place addmm_ of hora-torch."""
    return 2 * left.numel() * right[1]


def counter() -> FlopCounterMode:
    """A context that counts the matrix products inside; ``get_total_flops()`` tells them."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm})
