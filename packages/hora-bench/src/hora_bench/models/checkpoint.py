"""From safetensors files to NNX models: names are equal, only leaf names and the kernel orientation differ."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from hora_spec import HoraError
from jax.typing import DTypeLike
from safetensors import safe_open

from hora_bench.models.llama import Llama, LlamaConfig
from hora_bench.models.vit import ViT, ViTConfig, resize_positions

Tensors = Mapping[str, np.ndarray]


def read_safetensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of ``model.safetensors``, or of the shards that ``model.safetensors.index.json`` names.

    Raises
    ------
    HoraError
        The directory holds neither.
    """
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        if not (directory / name).exists():
            raise HoraError(f"a checkpoint directory holds model.safetensors, got {directory} without {name}")
        with safe_open(directory / name, framework="flax") as file:  # flax: NumPy has no bfloat16 of its own
            tensors |= {key: np.asarray(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118 (no mapping)
    return tensors


def load_vit(config: ViTConfig, tensors: Tensors, *, head: tuple[Any, Any] | None = None) -> ViT:
    """A ViT with timm's weights; positions are resized to the config's image size.

    Parameters
    ----------
    config
        Shape, as from `vit_config`.
    tensors
        timm's state dict as arrays.
    head
        New ``(kernel (embed, classes), bias (classes,))``, for another number of classes than the checkpoint's.
    """
    tensors = dict(tensors)
    prefix = config.num_prefix_tokens if config.pos_embed_prefix else 0
    positions = jnp.asarray(tensors["pos_embed"], jnp.float32)
    tensors["pos_embed"] = np.asarray(resize_positions(positions, grid=config.grid, prefix=prefix))
    if head is not None:
        tensors["head.weight"], tensors["head.bias"] = np.asarray(head[0]).T, np.asarray(head[1])
    model = nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))
    unused = ("mask_token",) if config.num_classes else ("mask_token", "head.weight", "head.bias")
    return assign(model, tensors, stacked="blocks" if config.scan_layers else None, unused=unused)


def vit_config(model: Any) -> ViTConfig:
    """The shape of a timm `VisionTransformer`, read from the module (no timm import needed).

    Raises
    ------
    HoraError
        The model has a part that the NNX ViT lacks.
    """
    import torch

    block, embed = model.blocks[0], model.patch_embed
    identity = torch.nn.Identity
    for part, present in {
        "normalised queries and keys": not isinstance(block.attn.q_norm, identity),
        "a norm before the blocks": not isinstance(model.norm_pre, identity),
        f"pooling {model.global_pool!r}": model.global_pool not in ("token", "avg"),
        "an MLP other than fc1, GELU, fc2": type(block.mlp).__name__ != "Mlp",
    }.items():
        if present:
            raise HoraError(f"the NNX ViT has plain pre-norm blocks, got {part}: use --backend torch")
    size, patch = embed.img_size, embed.patch_size
    if size[0] != size[1] or patch[0] != patch[1]:
        raise HoraError(f"the NNX ViT has square images and patches, got {size} and {patch}: pass a square image size")
    return ViTConfig(
        image_size=size[0],
        patch_size=patch[0],
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=block.attn.num_heads,
        mlp_dim=block.mlp.fc1.out_features,
        num_classes=model.num_classes,
        qkv_bias=block.attn.qkv.bias is not None,
        layer_scale=not isinstance(block.ls1, identity),
        class_token=model.cls_token is not None,
        reg_tokens=model.num_reg_tokens,
        pos_embed_prefix=not model.no_embed_class,
        pool=model.global_pool,
        norm=not isinstance(model.norm, identity),
        fc_norm=not isinstance(model.fc_norm, identity),
        norm_eps=block.norm1.eps,
    )


def load_llama(directory: Path, *, dtype: DTypeLike = "float32", **changes: Any) -> Llama:
    """A LLaMA from a Hugging Face directory (``config.json`` and safetensors).

    Parameters
    ----------
    directory
        Where the files are.
    dtype
        Of all weights, and so of the activations.
    **changes
        Fields of `LlamaConfig` to change, such as ``scan_layers=True``.
    """
    config = LlamaConfig.from_hf(json.loads((directory / "config.json").read_text())).replace(**changes)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    stacked = "model.layers" if config.scan_layers else None
    unused = ("lm_head.weight",) if config.tie_word_embeddings else ()
    return assign(model, read_safetensors(directory), stacked=stacked, unused=unused, dtype=dtype)


def assign(
    model: Any,
    tensors: Tensors,
    *,
    stacked: str | None = None,
    unused: Iterable[str] = (),
    dtype: DTypeLike = "float32",
) -> Any:
    """Fill an (abstract) NNX model with PyTorch tensors of the same module names.

    Parameters
    ----------
    model
        NNX module; every parameter is replaced.
    tensors
        Name to array, PyTorch names and orientation.
    stacked
        Path of a scanned stack: ``model.layers`` gathers ``model.layers.0.x, model.layers.1.x, ...`` on a leading axis.
    unused
        Names that may be left over.
    dtype
        Of the model's parameters.

    Raises
    ------
    HoraError
        A tensor is missing, left over, or has another shape.
    """
    graph, state = nnx.split(model)
    left = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")} - set(unused)
    filled = []
    for path, variable in nnx.to_flat_state(state):
        name = torch_name(path)
        shape = variable.get_value().shape
        if stacked and name.startswith(f"{stacked}."):
            names = [f"{stacked}.{i}{name.removeprefix(stacked)}" for i in range(shape[0])]
        else:
            names = [name]
        if absent := [n for n in names if n not in tensors]:
            raise HoraError(f"the checkpoint must hold {absent[0]!r} of shape {shape}, and it does not: wrong model?")
        values = [_oriented(path[-1], np.asarray(tensors[n], np.float32)) for n in names]
        value = np.stack(values) if names != [name] else values[0]
        if value.shape != shape:
            raise HoraError(f"{name} must have shape {shape} here, got {value.shape}: wrong model or image size?")
        left -= set(names)
        filled.append((path, variable.replace(jnp.asarray(value, dtype))))
    if left:
        raise HoraError(f"the model must use every tensor of the checkpoint, {len(left)} are left: {sorted(left)[:4]}")
    return nnx.merge(graph, nnx.from_flat_state(filled))


def torch_name(path: tuple[Any, ...]) -> str:
    """``("blocks", 0, "attn", "qkv", "kernel")`` to ``blocks.0.attn.qkv.weight``."""
    leaf = "weight" if path[-1] in ("kernel", "scale", "embedding") else path[-1]
    return ".".join(map(str, (*path[:-1], leaf)))


def _oriented(leaf: str, tensor: np.ndarray) -> np.ndarray:
    if leaf != "kernel":
        return tensor
    if tensor.ndim == 4:  # convolution over patches: a linear map of (row, column, channel)
        return rearrange(tensor, "d c p q -> (p q c) d")
    return tensor.T
