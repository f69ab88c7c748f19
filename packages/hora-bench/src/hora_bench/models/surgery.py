"""Changes to vision transformers: blocks that are left out as the batch says, and a fused qkv as three."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, final

import jax.numpy as jnp
import torch
from flax import nnx


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


@final
class TorchSplitQkv(torch.nn.Module):
    """``x -> [q(x), k(x), v(x)]`` with three `torch.nn.Linear`."""

    def __init__(self, fused: torch.nn.Linear) -> None:
        super().__init__()
        out, inputs = fused.out_features // 3, fused.in_features
        for index, name in enumerate("qkv"):
            part = torch.nn.Linear(inputs, out, bias=fused.bias is not None, device="meta")
            rows = slice(index * out, (index + 1) * out)
            part.weight = torch.nn.Parameter(fused.weight.detach()[rows].clone())
            if fused.bias is not None:
                part.bias = torch.nn.Parameter(fused.bias.detach()[rows].clone())
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The fused output."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


@final
class NnxSplitQkv(nnx.Module):
    """``x -> [q(x), k(x), v(x)]`` with three `nnx.Linear`."""

    def __init__(self, fused: nnx.Linear) -> None:
        inputs, out = fused.in_features, fused.out_features // 3
        for index, name in enumerate("qkv"):
            columns = slice(index * out, (index + 1) * out)
            part = nnx.eval_shape(lambda: nnx.Linear(inputs, out, use_bias=fused.bias is not None, rngs=nnx.Rngs(0)))
            part.kernel = nnx.Param(fused.kernel[...][:, columns])
            if fused.bias is not None:
                part.bias = nnx.Param(fused.bias[...][columns])
            setattr(self, name, part)

    def __call__(self, x: Any) -> Any:
        """The fused output."""
        return jnp.concatenate([self.q(x), self.k(x), self.v(x)], axis=-1)


def split_torch(model: torch.nn.Module) -> list[str]:
    """Split every ``attn.qkv`` of a timm ViT in place; names of the new Q and V modules."""
    names = [name for name, module in model.named_modules() if name.endswith("attn.qkv")]
    for name in names:
        model.set_submodule(name, TorchSplitQkv(model.get_submodule(name)))
    return [f"{name}.{part}" for name in names for part in "qv"]


def split_nnx(model: Any) -> None:
    """Split every ``attn.qkv`` of an unrolled NNX ViT in place."""
    for block in model.blocks:
        block.attn.qkv = NnxSplitQkv(block.attn.qkv)
