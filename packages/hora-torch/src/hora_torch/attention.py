"""``torch.nn.MultiheadAttention`` with adapted projections, without merging anything per call."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hora_spec import HoraError
from torch import Tensor, nn

from hora_torch.layer import HoraLayer
from hora_torch.linear import Branch, add_branches, has_hooks, low_rank_linear
from hora_torch.mixed import add_by_sample

_PARTS = ("q", "k", "v")


class HoraMultiheadAttention(nn.Module, HoraLayer):
    """Self- and cross-attention whose input projections carry branches (spec D3).

    ``nn.MultiheadAttention`` multiplies with its weights inside one functional call, so the attention itself is
    computed here: N batch, L and S target and source length, E embed.
    """

    def __init__(self, base_layer: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        HoraLayer.__init__(self, base_layer)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        adapter_names: Sequence[str] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``; `adapter_names` gives one adapter per sample."""
        names = self._working()
        if adapter_names is not None and not self.disable_adapters:
            names = [name for name in dict.fromkeys(adapter_names) if name in self.hora_attached]
        if not names:
            return self.base_layer(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        if query.is_nested:
            masked = attn_mask is not None or key_padding_mask is not None
            if masked or need_weights or not (query is key is value):
                raise HoraError(
                    "nested tensors are for self-attention alone, got a cross-attention, need_weights or a mask: pass "
                    "padded tensors with key_padding_mask"
                )
            return self._padded(query, adapter_names), None
        base, batched = self.get_base_layer(), query.dim() == 3
        self._check_plain(base)
        if is_causal and attn_mask is None:
            raise HoraError("is_causal is a hint about attn_mask, which is missing: pass attn_mask too")
        is_causal = is_causal and key_padding_mask is None and not need_weights
        if is_causal:  # the base believes the hint in these cases alone, and then reads no mask
            attn_mask = None
        inputs = (query, key, value)
        if not batched:
            inputs = tuple(x.unsqueeze(0) for x in inputs)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not base.batch_first:
            same = key is query, value is key
            query, key, value = (x.transpose(0, 1) for x in inputs)
            inputs = (query, query if same[0] else key, (query if same[0] else key) if same[1] else value)
        if adapter_names is None:
            q, k, v = self._project(inputs, names)
        else:
            q, k, v = self._project_mixed(inputs, names, adapter_names)
        k, v, mask = self._extend(k, v, _mask(attn_mask, key_padding_mask, q))
        q, k, v = (x.unflatten(-1, (base.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout = base.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            weights = nn.functional.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            weights = None
            heads = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        output = base.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if base.batch_first else output.transpose(0, 1), weights

    def input_of(self, projection: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """What a projection reads in a call with these arguments, (..., embed)."""
        given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
        return given[{"q": "query", "k": "key", "v": "value"}[projection]]

    def _padded(self, nested: Tensor, adapter_names: Sequence[str] | None) -> Tensor:
        """Self-attention over sequences of different length, as ``nn.TransformerEncoder`` passes padded batches."""
        x, there = (torch.nested.to_padded_tensor(values, 0.0) for values in (nested, torch.ones_like(nested)))
        padding = there[..., 0] == 0
        y, _ = self(x, x, x, key_padding_mask=padding, need_weights=False, adapter_names=adapter_names)
        return torch.nested.as_nested_tensor([row[: len(own)] for row, own in zip(y, nested.unbind(), strict=True)])

    def _check_plain(self, base: nn.MultiheadAttention) -> None:
        """The attention is computed here from the weights, so nothing may stand between them and the module."""
        if torch.compiler.is_compiling():
            return
        weights = [base.in_proj_weight, base.out_proj.weight]
        odd = [type(w).__name__ for w in weights if type(w) not in (nn.Parameter, Tensor, type(None))]
        if odd or has_hooks(base) or has_hooks(base.out_proj):
            raise HoraError(
                f"an adapted nn.MultiheadAttention computes with plain weights, got {odd or 'hooks'} (offloaded, "
                "quantised or sharded): keep it whole on one device, or merge the adapter first"
            )

    def _project(self, inputs: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
        """Projected query, key and value; one product when they are one tensor and one weight."""
        passes = [(name, self._drops(name)) for name in names]
        branches = [self._branches_of(name, 1 - rate) for name, rate in passes]
        base, dim = self.get_base_layer(), self.get_base_layer().embed_dim
        if not any(rate for _, rate in passes) and inputs[0] is inputs[1] is inputs[2] and base._qkv_same_embed_dim:
            every = [branch for found in branches for branch in found.values()]
            route = self.hora_attached[names[0]].route
            return list(
                low_rank_linear(inputs[0], base.in_proj_weight, base.in_proj_bias, every, route=route).split(dim, -1)
            )
        result = []
        for part, x in zip(_PARTS, inputs, strict=True):
            weight, bias = self._weight(part)
            own = [
                (_alone(found[part]), rate) for found, (_, rate) in zip(branches, passes, strict=True) if part in found
            ]
            kept = [branch for branch, rate in own if not rate]
            y = low_rank_linear(x, weight, bias, kept) if kept else nn.functional.linear(x, weight, bias)
            for branch, rate in own:
                if rate:
                    keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - rate)
                    y = add_branches(y, x, [branch], keep=keep)
            result.append(y)
        return result

    def _project_mixed(
        self, inputs: Sequence[Tensor], names: Sequence[str], adapter_names: Sequence[str]
    ) -> list[Tensor]:
        self._check_mixed(len(inputs[0]), adapter_names)
        result = []
        for part, x in zip(_PARTS, inputs, strict=True):

            def add(name: str, y: Tensor, x: Tensor, part: str = part) -> Tensor:
                return add_branches(y, x, [_alone(self._branches_of(name, 1.0)[part])])

            present = [name for name in names if part in self.hora_attached[name].sites]
            y = nn.functional.linear(x, *self._weight(part))
            result.append(add_by_sample(y, x, adapter_names, present, add))
        return result

    def _weight(self, part: str) -> tuple[Tensor, Tensor | None]:
        base, index = self.get_base_layer(), _PARTS.index(part)
        rows = slice(index * base.embed_dim, (index + 1) * base.embed_dim)
        weight = base.in_proj_weight[rows] if base._qkv_same_embed_dim else getattr(base, f"{part}_proj_weight")
        return weight, None if base.in_proj_bias is None else base.in_proj_bias[rows]

    def _extend(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Key and value with the learned and the zero row that the base may ask for."""
        base = self.get_base_layer()
        rows = []
        if base.bias_k is not None:
            rows.append((base.bias_k, base.bias_v))
        if base.add_zero_attn:
            rows.append((torch.zeros_like(k[:1, :1]), torch.zeros_like(v[:1, :1])))
        for row_k, row_v in rows:
            k = torch.cat([k, row_k.expand(len(k), 1, -1)], 1)
            v = torch.cat([v, row_v.expand(len(v), 1, -1)], 1)
            mask = None if mask is None else nn.functional.pad(mask, (0, 1))
        return k, v, mask

    def __getattr__(self, name: str) -> Any:
        """What surrounding modules read from an attention (``batch_first``, ``num_heads``, ...) comes from the base.

        ``_qkv_same_embed_dim`` is False while adapters act, so that ``nn.TransformerEncoderLayer`` takes no shortcut
        past this module.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("hora_"):
                raise
            if name == "_qkv_same_embed_dim" and not (self.merged or self.disable_adapters):
                return False
            return getattr(self.get_base_layer(), name)

    def __repr__(self) -> str:
        return "hora." + super().__repr__()


def _alone(branch: Branch) -> Branch:
    """The branch of a projection that is computed apart from the others of its weight."""
    return branch._replace(start=0, stop=branch.stop - branch.start)


def _mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """One additive mask (N or 1, heads or 1, L, S) from both masks; True means masked out."""
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask, q.dtype)
        mask = mask.unflatten(0, (q.shape[0], -1)) if mask.dim() == 3 else mask
    if padding is not None:
        padding = _additive(padding, q.dtype)[:, None, None, :]
        mask = padding if mask is None else mask + padding
    return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
    return mask.to(dtype)
