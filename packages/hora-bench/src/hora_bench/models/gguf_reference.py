"""A second reading of a GGUF file: a LLaMA's logits in NumPy, from the file's own tensors and settings alone.

It shares no code with `transformers`, so that a converted model that gives the same logits is converted right: the
rotary layout, base and grouping of heads, the norms' eps and the output that is or is not tied to the embedding.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

Hidden = Float64[np.ndarray, "seq embed"]
Heads = Float64[np.ndarray, "heads seq head_dim"]


def logits(source: Path, tokens: list[int]) -> Float64[np.ndarray, "seq vocab"]:
    """Logits after every token, in float64.

    Parameters
    ----------
    source
        A GGUF file of architecture ``llama`` without rotary scaling; quantised tensors are expanded by `gguf`.
    tokens
        Token ids of one prompt.

    Notes
    -----
    A rotary pair is ``(2i, 2i + 1)`` within a head in GGUF, ``(i, i + head_dim / 2)`` in `transformers`.
    """
    import gguf

    file = gguf.GGUFReader(source)
    stored = {tensor.name: tensor for tensor in file.tensors}
    settings = {name: field.contents() for name, field in file.fields.items() if name.startswith("llama.")}
    query_heads, key_heads = settings["llama.attention.head_count"], settings["llama.attention.head_count_kv"]
    eps = settings["llama.attention.layer_norm_rms_epsilon"]
    base = settings.get("llama.rope.freq_base", 10_000.0)

    def weight(name: str) -> Any:
        tensor = stored[f"{name}.weight"]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)

    def norm(x: Hidden, name: str) -> Hidden:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight(name)

    def heads(x: Hidden, name: str, count: int) -> Heads:
        return (x @ weight(name).T).reshape(len(x), count, -1).swapaxes(0, 1)

    embedding = weight("token_embd")
    x = embedding[tokens]
    for layer in range(settings["llama.block_count"]):
        block = f"blk.{layer}"
        y = norm(x, f"{block}.attn_norm")
        q = _rotated(heads(y, f"{block}.attn_q", query_heads), base)
        k = _rotated(heads(y, f"{block}.attn_k", key_heads), base)
        v = heads(y, f"{block}.attn_v", key_heads)
        k, v = (part.repeat(query_heads // key_heads, axis=0) for part in (k, v))
        x = x + _attended(q, k, v) @ weight(f"{block}.attn_output").T
        y = norm(x, f"{block}.ffn_norm")
        gate = y @ weight(f"{block}.ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ weight(f"{block}.ffn_up").T)) @ weight(f"{block}.ffn_down").T
    output = weight("output") if "output.weight" in stored else embedding
    return norm(x, "output_norm") @ output.T


def _rotated(x: Heads, base: float) -> Heads:
    """Each pair of neighbours as a complex number, turned by the angle of its position."""
    _, seq, dim = x.shape
    angle = np.arange(seq)[:, None] * base ** -(np.arange(0, dim, 2) / dim)
    return np.ascontiguousarray((x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)).view(np.float64)


def _attended(q: Heads, k: Heads, v: Heads) -> Hidden:
    """Causal softmax attention, heads side by side."""
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ v
    return mixed.swapaxes(0, 1).reshape(q.shape[1], -1)
