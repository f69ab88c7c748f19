"""Whether a merged model computes what the adapted one does, as far as rounding lets one tell."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hora_torch.findings import Verdict


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model answers to one batch: without adapters, with them, with them once more, and merged."""

    base: Tensor
    adapted: Tensor
    again: Tensor
    merged: Tensor
    half: bool
    """Whether a merged weight has less than 32 bits, so that rounding shows."""
    restored: bool
    """Whether unmerging brought back every bit."""
    lost: float
    """The part of an update that rounding to codes lost."""

    def compared(self, rounding: Callable[[], float]) -> tuple[Verdict, str]:
        """Whether merging changes nothing, measured by what the adapters change, and what speaks against it.

        `rounding` is asked how far the adapted output moves by one rounding of each adapted module.
        """
        effect, noise, off = (float((one - self.adapted).norm()) for one in (self.base, self.again, self.merged))
        bound = 0.5 * effect if self.half else 1e-3 * effect + 1e-5 * float(self.adapted.norm())
        if not noise <= bound:
            return "unknown", "the model answers one batch in two ways, from one seed"
        if not self.half and bound > 0.1 * effect:
            return "unknown", "the adapters change the output by no more than rounding does"
        if off <= bound:
            return "ok", ""
        found = f"merging is off by {off / effect:.2g} of the update's effect"
        if self.restored and not self.half and off <= 8 * rounding():
            return "unknown", f"{found}; so much does rounding alone"
        if self.lost:
            return "unknown", f"{found}; rounding to codes loses up to {self.lost:.0%} of the update"
        return "wrong", found


def one_rounding_away(_: Any, __: Any, y: Any) -> Any:
    """A forward hook: an output of which each number is one rounding away, up or down, always the same way."""
    if not isinstance(y, Tensor):
        return y
    up = torch.rand(y.shape, generator=torch.Generator().manual_seed(0)).to(y.device) < 0.5
    return torch.where(up, y.nextafter(torch.full_like(y, torch.inf)), y.nextafter(torch.full_like(y, -torch.inf)))
