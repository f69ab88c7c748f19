"""Adversarial steps inside a ball of the largest norm around an image, white-box, through the whole model.

Own code: no library attacks seeds side by side (design note 7).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from hora_spec import HoraError
from pydantic import Field, ValidationError

from hora_bench.request import Finite, Record, first_error

RELATIVE_STEP = 2.5  # of a step to radius / steps (Madry et al. 2018)


class Attack(Record):
    """What adversarial steps may do.

    Attributes
    ----------
    epsilon
        Radius of the ball, in pixel values, of 255.
    steps
        Of PGD, which starts at random; FGSM takes one step of the whole radius from the image itself.
    images
        Of the test split, equally many of each class.
    seed
        Of the random start, which is the same for all that is compared.
    """

    epsilon: Finite = Field(gt=0, lt=255)
    steps: int = Field(default=4, ge=1, le=1000)
    images: int = Field(default=100, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**31)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Attack:
        """From a file.

        Raises
        ------
        HoraError
            It has another field, or one out of range.
        """
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            what, where = first_error(error)
            raise HoraError(
                f"an attack is a table of {', '.join(cls.model_fields)}, got {what} at {where or 'it'}: change it"
            ) from error

    def start(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Where PGD starts, in units of the radius."""
        return torch.from_numpy(np.random.default_rng(self.seed).uniform(-1, 1, shape).astype(np.float32))


def fgsm(loss_of: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, radius: float) -> torch.Tensor:
    """One step of the whole radius along the sign of the gradient (Goodfellow et al. 2015).

    Parameters
    ----------
    loss_of
        From images to the sum of losses, each of which depends on its own image alone.
    images
        Of any shape, pixels from 0 to 1.
    radius
        Of the ball, in the same unit.
    """
    return _stepped(loss_of, images, images, radius=radius, size=radius)


def pgd(
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    radius: float,
    *,
    steps: int,
    start: torch.Tensor,
) -> torch.Tensor:
    """Projected steps from a random start (Madry et al. 2018); the last of them.

    Parameters
    ----------
    loss_of, images, radius
        As for `fgsm`.
    steps
        How many, each ``2.5 radius / steps``.
    start
        In units of the radius, of a shape that fits.
    """
    moved = (images + radius * start).clamp(0, 1)
    for _ in range(steps):
        moved = _stepped(loss_of, images, moved, radius=radius, size=RELATIVE_STEP * radius / steps)
    return moved


def _stepped(
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    moved: torch.Tensor,
    *,
    radius: float,
    size: float,
) -> torch.Tensor:
    moved = moved.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(moved), moved)
    further = moved.detach() + size * gradient.sign()
    return further.clamp(images - radius, images + radius).clamp(0, 1)
