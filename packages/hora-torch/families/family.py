"""What a row of the table is: a model with random weights, inputs for it, and what is known of it beforehand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Heads = Mapping[str, set[tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of model, tiny and random."""

    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], dict[str, Any]]
    targets: tuple[str, ...] = ()
    """Names that a user would give for q and v."""
    heads: Heads = field(default_factory=dict)
    """True ``(heads, head_dim)`` of the projections over all layers, read in the source; empty where not read."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the config with which the family is adapted where the default does not do."""
    unlike_attention: str = ""
    """Why gradients do not tell rows and heads, where they do not: heads are mixed, channels attend ..."""

    def model(self) -> nn.Module:
        """The same weights at every call, none of them where initialisation hides errors."""
        torch.manual_seed(0)
        model = self.build().eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for param in model.parameters():
                if param.is_floating_point():
                    scale = 0.1 if param.ndim < 2 else min(0.1, 0.5 * (param.numel() / len(param)) ** -0.5)
                    param.add_(torch.randn(param.shape, generator=generator), alpha=scale)
        return model.requires_grad_(True)


def ids(*shape: int) -> Tensor:
    """Token numbers above those of special tokens."""
    return torch.randint(6, 60, shape or (2, 7), generator=torch.Generator().manual_seed(2))


def noise(*shape: int) -> Tensor:
    """Normal values, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def outputs(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """All floating-point outputs of a model as one vector, the same at every call."""
    torch.manual_seed(4)  # some models draw in evaluation too
    found = tensors(model(**inputs))
    if not found:
        raise ValueError("the model returns no floating-point tensor")
    return torch.cat([tensor.flatten().float() for tensor in found])


def tensors(value: Any) -> list[Tensor]:
    """Floating-point tensors in nested outputs, caches left out."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors(item)]
    return []


_USUAL = frozenset(
    (
        *("q_proj", "v_proj", "query", "value", "q", "v", "q_lin", "v_lin", "to_q", "to_v", "wq", "wv", "Wq", "Wv"),
        *(
            "query_proj",
            "value_proj",
            "linear_q",
            "linear_v",
            "query_layer",
            "value_layer",
            "q_head",
            "v_head",
            "q_attn",
        ),
        *("projection_query", "projection_value", "qkv", "qkv_proj", "qkv_linear", "c_attn", "Wqkv", "query_key_value"),
        *("att_proj", "to_qkv", "to_kv", "kv", "kv_proj", "qk", "query_key", "q_b_proj"),
    )
)


_RARE = frozenset(("kv_b_proj", "in_proj_qkv", "in_proj_qkvz", "qkv_opreact", "in_proj", "queries_keys_values.linear"))


def usual_targets(model: nn.Module) -> tuple[str, ...]:
    """Names that people give to projections for q and v, as far as the model has them."""
    found = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")}
    return tuple(sorted(_USUAL & found or _RARE & found))
