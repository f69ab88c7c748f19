"""Modules that can be adapted, and the names that choose them."""

import difflib
import itertools
from collections.abc import Mapping

import torch
from hora_spec import HoraError
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers.pytorch_utils import Conv1D

from hora_torch.config import HoraConfig

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class NoTargetError(HoraError, NoMatchingPeftModuleError):
    """No module of the model can be, or was meant to be, adapted."""


def base_module(module: nn.Module) -> nn.Module:
    """The module beneath any adapters."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_supported(module: nn.Module) -> bool:
    """Whether a module is a linear map, or an attention with its projections inside."""
    if isinstance(module, (nn.MultiheadAttention, Conv1D, nn.Linear)):
        return True
    if isinstance(module, CONVOLUTIONS):
        return is_pointwise(module)
    # codes have names of their own: qweight, W_q, codebooks
    tensors = itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
    own = hasattr(module, "weight") or next(tensors, None) is not None
    return own and hasattr(module, "in_features") and hasattr(module, "out_features")


def is_pointwise(module: nn.Module) -> bool:
    """Whether a convolution maps each position by itself: a linear map of its channels, or of groups of them."""
    return all(size == 1 for size in module.kernel_size) and module.padding in ("valid", (0,) * len(module.kernel_size))


def out_in(module: nn.Module) -> tuple[int, int]:
    """Rows and columns of the matrix that a supported module stores."""
    if isinstance(module, CONVOLUTIONS):
        return module.out_channels, module.in_channels // module.groups
    if isinstance(module, nn.MultiheadAttention):
        return 3 * module.embed_dim, module.embed_dim
    if isinstance(module, Conv1D):
        embed, rows = module.weight.shape
        return rows, embed
    return module.out_features, module.in_features


def device_of(module: nn.Module) -> torch.device:
    """Where the weight of a supported module is; the codes of some are no parameters."""
    return next(itertools.chain(module.parameters(), module.buffers())).device


def stored_form(module: nn.Module) -> tuple[tuple[int, ...], str]:
    """Shape of the weight of a map, and the pattern of a projection that is all of it (spec L1)."""
    rows, embed = out_in(module)
    if isinstance(module, Conv1D):
        return (embed, rows), "d (h k)"
    ones = len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else 0
    return (rows, embed, *(1,) * ones), " ".join(("(h k) d", *"1" * ones))


def no_match(model: nn.Module, config: HoraConfig) -> NoTargetError:
    """The error for targets that match nothing, with the closest module names."""
    wanted = config.target_modules
    names = [name for name, module in model.named_modules() if name and is_supported(base_module(module))]
    last = {name.rpartition(".")[2] for name in names}
    wishes = [wanted] if isinstance(wanted, str) else sorted(wanted or ())
    close = [match for wish in wishes for match in difflib.get_close_matches(wish, [*sorted(last), *names], 5, 0.4)]
    message = f"Target modules {wanted} not found in the base model."
    for key in ("layers_to_transform", "layers_pattern"):
        if getattr(config, key) is not None:
            message += f" Note: you specified '{key}': {getattr(config, key)}."
    return NoTargetError(
        f"{message} Closest module names: {list(dict.fromkeys(close)) or sorted(last)[:20]}; name Linear, Conv1D or "
        "MultiheadAttention modules"
    )


def no_default(left_out: Mapping[str, str]) -> NoTargetError:
    """The error for a model of which nothing can be adapted without being told, with the reasons."""
    reasons = list(dict.fromkeys(left_out.values()))[:3]
    return NoTargetError(
        "Please specify `target_modules`: no attention module whose rows and heads are known was found"
        + (f" ({'; '.join(reasons)})" if reasons else "")
        + "; name its modules, and pass num_heads if the model does not tell"
    )


def short_names(model: nn.Module, chosen: list[str]) -> set[str]:
    """Last components of the chosen paths, or the whole paths where those would match other modules too."""
    short, others = {name.rpartition(".")[2] for name in chosen}, set(chosen)
    if any(name.rpartition(".")[2] in short for name, _ in model.named_modules() if name not in others):
        return set(chosen)
    return short
