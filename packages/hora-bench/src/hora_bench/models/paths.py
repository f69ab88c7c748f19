"""Blocks left out for some images while training: which ones is given with the batch, so that backends agree."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, final

import torch


@final
class PathDrop(torch.nn.Module):
    """Multiplies a branch by what the batch says for each image; in place of timm's `DropPath`, which draws itself."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x (images, seq, embed)``, or its rows times 0 or more."""
        return x if self.kept is None else x * self.kept[:, None, None].to(x.dtype)

    @staticmethod
    def into(model: Any) -> None:
        """Make every block of a timm ViT follow the batch."""
        for block in model.blocks:
            block.drop_path1, block.drop_path2 = PathDrop(), PathDrop()

    @staticmethod
    @contextmanager
    def following(model: torch.nn.Module, paths: torch.Tensor | None) -> Generator[None]:
        """Calls inside follow ``paths (images, blocks, 2)``; without any, every block is whole."""
        drops = [] if paths is None else [module for module in model.modules() if isinstance(module, PathDrop)]
        for index, drop in enumerate(drops):
            drop.kept = paths[:, index // 2, index % 2] if paths is not None else None
        try:
            yield
        finally:
            for drop in drops:
                drop.kept = None
