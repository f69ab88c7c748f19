"""LoRA adapters on disk, as PEFT and servers read them (spec F6)."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from hora_spec.adapter import Adapter
from hora_spec.directory import write_pair
from hora_spec.errors import HoraError
from hora_spec.files import PREFIX, pattern
from hora_spec.lora import LoraModule, portable, to_lora
from hora_spec.servers import check_server
from hora_spec.tensors import encode

_CARRIED = (
    *("task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
    *("modules_to_save", "trainable_token_indices"),  # without which their tensors would be left unread
)


def export_lora(
    adapter: Adapter,
    directory: str | os.PathLike[str],
    *,
    dtype: DTypeLike = np.float32,
    compact: bool = False,
    for_server: str | None = None,
) -> None:
    """Write an adapter as a standard PEFT LoRA directory (spec F6).

    Parameters
    ----------
    adapter
        The adapter; modules that were trained whole travel along.
    directory
        New, empty, or left by an export that was interrupted.
    dtype
        Float16, float32 or float64: the LoRA tensors are computed in float64 and rounded once.
    compact
        Give each module its own rank and alpha by patterns, in place of the `portable` form. Smaller where ranks
        differ; PEFT reads it, other software may not.
    for_server
        One of `hora_spec.servers.SERVERS`: refuse what that server would reject or misread.

    Raises
    ------
    HoraError
        As `to_lora`; or if the directory holds anything, `dtype` cannot hold a factor, or the server takes no such
        adapter (spec F3, F6). Nothing has been written then.
    """
    modules = to_lora(adapter)
    if not compact:
        modules = portable(modules)
    if for_server is not None:
        check_server(for_server, modules, adapter.modules, adapter.config)
    tensors: dict[str, NDArray[Any]] = {PREFIX + name: value for name, value in adapter.modules.items()}
    for path, module in modules.items():
        tensors |= {f"{PREFIX}{path}.{name}": rounded(path, value, dtype) for name, value in _tensors(module).items()}
    write_pair(Path(directory), _config(modules, adapter.config), encode(tensors), replace=False)


def rounded(path: str, value: NDArray[np.float64], dtype: DTypeLike) -> NDArray[Any]:
    """A factor of the module at `path` in `dtype`; raises HoraError if that cannot hold its numbers (spec F6)."""
    if not _is_known(dtype):
        got = getattr(dtype, "__name__", dtype)
        raise HoraError(f"LoRA tensors are float16, float32 or float64, got {got}: choose one (spec F6)")
    with np.errstate(over="ignore", under="ignore"):
        cast = value.astype(dtype)
    if not np.isfinite(cast).all():
        raise HoraError(f"the LoRA factors of {path} overflow {cast.dtype}: export in a wider dtype (spec F6)")
    if np.linalg.norm(value - cast) > np.finfo(cast.dtype).eps * np.linalg.norm(value):
        raise HoraError(f"the LoRA factors of {path} are too small for {cast.dtype}: export in a wider dtype (spec F6)")
    return cast


def _is_known(dtype: Any) -> bool:
    try:
        return isinstance(dtype, str | type | np.dtype) and np.dtype(dtype) in (np.float16, np.float32, np.float64)
    except TypeError:
        return False


def _tensors(module: LoraModule) -> dict[str, NDArray[np.float64]]:
    ones = (1,) * module.kernel_axes
    tensors = {
        name: x.reshape(*x.shape, *ones) for name, x in (("lora_A.weight", module.a), ("lora_B.weight", module.b))
    }
    if module.parameter == "in_proj_weight":
        # PEFT 0.21 adapts in_proj and out_proj of nn.MultiheadAttention together or not at all: out_proj by zero
        embed = module.a.shape[1]
        tensors["base_layer.out_proj.lora_A.weight"] = np.zeros((module.rank, embed))
        tensors["base_layer.out_proj.lora_B.weight"] = np.zeros((embed, module.rank))
    return tensors


def _config(modules: Mapping[str, LoraModule], config: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's LoRA config; the largest rank is the default, other ranks and alphas are patterns."""
    default = max(modules.values(), key=lambda module: module.rank)
    ranks = {pattern(path): module.rank for path, module in modules.items() if module.rank != default.rank}
    alphas = {pattern(path): _number(module.alpha) for path, module in modules.items() if module.alpha != default.alpha}
    return {
        **{key: config[key] for key in _CARRIED if key in config},
        "peft_type": "LORA",
        "r": default.rank,
        "lora_alpha": _number(default.alpha),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": list(modules),
        "lora_dropout": 0.0,
        "bias": {"hora_only": "lora_only"}.get(bias := config.get("bias", "none"), bias),
        "fan_in_fan_out": all(module.fan_in_fan_out for module in modules.values()),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
