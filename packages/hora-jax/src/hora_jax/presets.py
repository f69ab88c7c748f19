"""Targets of known models, by the names and layouts their authors chose.

Every function returns a tuple of `Target`; ``projections`` picks among q, k and v.
"""

from collections.abc import Sequence

from hora_jax.targets import Target

Heads = int | str


def llama(
    *, projections: Sequence[str] = ("q", "v"), num_heads: Heads | None = None, num_kv_heads: Heads | None = None
) -> tuple[Target, ...]:
    """Transformers' names in Flax: ``model.layers.0.self_attn.q_proj.kernel``, unrolled or scanned over layers.

    Parameters
    ----------
    projections
        Among q, k and v.
    num_heads, num_kv_heads
        Head counts. None: ``config.num_attention_heads`` and ``config.num_key_value_heads`` of the attention modules.
    """
    heads = {"q": num_heads or "config.num_attention_heads"}
    kv = num_kv_heads or num_heads or "config.num_key_value_heads"
    targets = []
    for p in projections:
        leaf, count = f"self_attn.{p}_proj.kernel", heads.get(p, kv)
        targets += [
            Target(f"**.layers.*.{leaf}", p, "d (h k)", count),
            Target(f"**.layers.{leaf}", p, "l d (h k)", count, layer="{0}.layers.{l}.self_attn"),
        ]
    return tuple(targets)


def vit(*, projections: Sequence[str] = ("q", "v"), num_heads: Heads = "num_heads") -> tuple[Target, ...]:
    """Timm's names in Flax: the fused ``blocks.0.attn.qkv.kernel``, unrolled or scanned over blocks.

    Parameters
    ----------
    projections
        Among q, k and v.
    num_heads
        Head count, or the attribute of the attention modules that holds it.
    """
    targets = []
    for p in projections:
        part = ("qkv".index(p), 3)
        targets += [
            Target("**.blocks.*.attn.qkv.kernel", p, "d (h k)", num_heads, part),
            Target("**.blocks.attn.qkv.kernel", p, "l d (h k)", num_heads, part, layer="{0}.blocks.{l}.attn"),
        ]
    return tuple(targets)
