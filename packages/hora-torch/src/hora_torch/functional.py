"""HoRA's equations on tensors: factors, delta, and the adapted linear map.

The same functions, names and argument order as `hora_spec.reference`, vectorised over heads.
Axes: h heads, k head_dim, d embed, r rank, m hidden, e head_embed.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
from hora_spec import LAYER_NORM_EPS, LEAKY_RELU_SLOPE, AdapterSpec, Factors, LayerShape, name_of_a
from torch import Tensor, nn

from hora_torch.linear import Branch, Route, low_rank_linear

__all__ = ["Factors", "delta", "factor_a", "factor_b", "factors", "hora_linear"]

Params = Mapping[str, Tensor]


def factors(
    spec: AdapterSpec, layer: LayerShape, params: Params, projections: Iterable[str] | None = None
) -> dict[str, Factors]:
    """Factors of the projections of a layer (spec G1 to G6, G8).

    Parameters
    ----------
    spec, layer
        Method and shapes.
    params
        Canonical name to tensor, shapes as in `hora_spec.param_shapes`.
    projections
        Names of the wanted ones, by default all.

    Returns
    -------
    dict
        Projection to ``Factors(a, b)``: a (rank, embed), or (heads, rank, embed) when free per head; b (heads,
        head_dim, rank).
    """
    wanted = layer if projections is None else projections
    hidden: dict[int, Tensor] = {}
    return {p: Factors(factor_a(spec, params, p), _factor_b(spec, layer, params, p, hidden)) for p in wanted}


def delta(spec: AdapterSpec, layer: LayerShape, params: Params) -> dict[str, Tensor]:
    """Dense update of every projection, ``scaling * stack_i(B_i) A``, (heads * head_dim, embed) (spec D1, D2)."""
    return {p: spec.scaling * (b @ a).reshape(-1, a.shape[-1]) for p, (a, b) in factors(spec, layer, params).items()}


def hora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Factors,
    scaling: float,
    *,
    route: Route = "auto",
) -> Tensor:
    """Adapted projection ``x (W + delta)^T + bias`` without a dense delta or a dense gradient (spec D3).

    Parameters
    ----------
    x
        (..., embed).
    weight
        Frozen weight (heads * head_dim, embed); a transposed view of a stored (embed, heads * head_dim) is as fast.
    bias
        (heads * head_dim,) or None.
    factors
        Of the projection; cast to the dtype of `x`.
    scaling
        ``spec.scaling``.
    route
        ``"branch"`` adds ``scaling * (x A^T) B^T`` in place; ``"merge"`` multiplies with ``W + delta``, for float32;
        ``"auto"`` chooses.

    Returns
    -------
    Tensor
        (..., heads * head_dim). Differentiable twice, under `torch.func`, autocast, checkpointing and compilation.
    """
    a, b = stacked(factors)
    return low_rank_linear(x, weight, bias, [Branch(a, b, scaling, 0, b.shape[0])], route=route)


def stacked(factors: Factors) -> tuple[Tensor, Tensor]:
    """The factors as two matrices, a (rank, embed) and b (heads * head_dim, rank).

    Heads that own their A stand block-diagonally, at rank ``heads * rank``.
    """
    a, b = cast("tuple[Tensor, Tensor]", factors)
    if a.ndim == 2:
        return a, b.flatten(0, 1)
    heads, head_dim, rank = b.shape
    eye = torch.eye(heads, dtype=b.dtype, device=b.device)
    return a.flatten(0, 1), torch.einsum("hkr,hg->hkgr", b, eye).reshape(heads * head_dim, heads * rank)


def factor_a(spec: AdapterSpec, params: Params, projection: str) -> Tensor:
    """A of one projection: free, fixed, or ``(g_A W_2 s(W_1 diag(seed)))^T`` (spec G4)."""
    if not spec.generates_a:
        a = params[name_of_a(spec, projection)]
        return a if spec.trains_a else a.detach()
    hidden = activation(spec.activation, params["a_in"] * params["a_seed"])
    return hidden.T @ _gained(params[f"a_out.{projection}"], spec.gain_a).T


def factor_b(spec: AdapterSpec, layer: LayerShape, params: Params, projection: str) -> Tensor:
    """B of all heads of one projection: free, or ``g_B W_2 s(W_1 LN(E_i))``, plus the residual (spec G1 to G3)."""
    return _factor_b(spec, layer, params, projection, {})


def _factor_b(
    spec: AdapterSpec, layer: LayerShape, params: Params, projection: str, hidden: dict[int, Tensor]
) -> Tensor:
    """As `factor_b`; projections whose heads average as many embeddings share what is `hidden`."""
    if not spec.generates_b:
        return params[f"b.{projection}"]
    group = layer.group_size(projection)
    if group not in hidden:
        hidden[group] = _hidden(spec, params, group)
    b = nn.functional.linear(hidden[group], _gained(params[f"b_out.{projection}"], spec.gain_b))
    b = b.view(spec.rank, -1, b.shape[-1]).permute(1, 2, 0)
    if not spec.residual:
        return b
    free = params[f"b.{projection}"]
    return b + free if spec.gate is None else b + _gained(params[f"gate.{projection}"], spec.gain_residual) * free


def _hidden(spec: AdapterSpec, params: Params, group: int) -> Tensor:
    """``s(W_1 LN(E_i))`` of the mean embedding of every `group` heads, (rank * heads, hidden).

    A matrix, since torch makes four nodes of a product with more axes; the ranks first, so that what is computed from
    it is B transposed, in one piece.
    """
    embed = params["head_embed"].permute(2, 0, 1)
    if group > 1:
        embed = embed.unflatten(1, (-1, group)).mean(2)
    if spec.normalize:
        embed = torch.layer_norm(embed, embed.shape[-1:], eps=LAYER_NORM_EPS)
    return activation(spec.activation, nn.functional.linear(embed.flatten(0, 1), params["b_in"]))


def _gained(weight: Tensor, gain: float) -> Tensor:
    return weight if gain == 1 else weight * gain


def activation(name: str, u: Tensor) -> Tensor:
    """``s(u)`` (spec G3)."""
    return _ACTIVATIONS[name](u)


_ACTIVATIONS: dict[str, Any] = {
    "leaky_relu": partial(nn.functional.leaky_relu, negative_slope=LEAKY_RELU_SLOPE),
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda u: u,
}
