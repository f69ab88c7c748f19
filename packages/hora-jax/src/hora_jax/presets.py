"""Targets of known models, by the names and layouts their authors chose.

Every function returns a tuple of `Target`, and takes `projections`, a choice among q, k and v. Layers carry the names
that the same model has in PyTorch, where it exists there.
"""

from collections.abc import Sequence

from hora_spec import HoraError

from hora_jax.targets import Target

Heads = int | str
QV = ("q", "v")


def llama(
    projections: Sequence[str] = QV, *, num_heads: Heads | None = None, num_kv_heads: Heads | None = None
) -> tuple[Target, ...]:
    """Transformers' names in Flax: ``model.layers.0.self_attn.q_proj.kernel``, unrolled or scanned over layers.

    Parameters
    ----------
    projections
        Among q, k and v.
    num_heads, num_kv_heads
        Head counts. None: ``config.num_attention_heads`` and ``config.num_key_value_heads`` of the attention modules.
    """
    kv = num_kv_heads or num_heads or "config.num_key_value_heads"
    targets = []
    for p in _ordered(projections):
        heads = (num_heads or "config.num_attention_heads") if p == "q" else kv
        targets += [
            Target(f"**.layers.*.self_attn.{p}_proj.kernel", p, "d (h k)", heads),
            Target(f"**.layers.self_attn.{p}_proj.kernel", p, "l d (h k)", heads, layer="{0}.layers.{l}.self_attn"),
        ]
    return tuple(targets)


def vit(projections: Sequence[str] = QV, *, num_heads: Heads = "num_heads") -> tuple[Target, ...]:
    """Timm's names in Flax: the fused ``blocks.0.attn.qkv.kernel``, unrolled or scanned over blocks.

    Parameters
    ----------
    projections
        Among q, k and v.
    num_heads
        Head count, or the attribute of the attention modules that holds it.
    """
    targets = []
    for p in _ordered(projections):
        part = ("qkv".index(p), 3)
        targets += [
            Target("**.blocks.*.attn.qkv.kernel", p, "d (h k)", num_heads, part),
            Target("**.blocks.attn.qkv.kernel", p, "l d (h k)", num_heads, part, layer="{0}.blocks.{l}.attn"),
        ]
    return tuple(targets)


def attention(projections: Sequence[str] = QV, *, stack_axis: int | None = None) -> tuple[Target, ...]:
    """Flax's own attention, wherever it is: `nnx.MultiHeadAttention`, and Linen's `MultiHeadDotProductAttention`.

    Parameters
    ----------
    projections
        Among q, k and v.
    stack_axis
        Axis of the kernels that a scan over layers has added, if any. Layers are then named ``<path>.<place>``.
    """
    axes = ["d", "h", "k"]
    if stack_axis is not None:
        axes.insert(stack_axis % 4, "l")
    layer = None if stack_axis is None else "{0}.{l}"
    return tuple(Target(f"**.{_FLAX[p]}.kernel", p, " ".join(axes), layer=layer) for p in _ordered(projections))


def equinox(projections: Sequence[str] = QV) -> tuple[Target, ...]:
    """`equinox.nn.MultiheadAttention`, wherever it is: ``query_proj.weight`` as in PyTorch's `Linear`."""
    return tuple(Target(f"**.{_FLAX[p]}_proj.weight", p, "(h k) d", "num_heads") for p in _ordered(projections))


def jimm_vit(projections: Sequence[str] = QV) -> tuple[Target, ...]:
    """The ViT of jimm: Flax attention inside a scanned ``layers`` or a list of ``blocks``.

    Layers carry the names of transformers' ViT, ``vit.layers.0.attention``.
    """
    targets = []
    for p in _ordered(projections):
        leaf, module = f"attn.{_FLAX[p]}.kernel", f"{p}_proj"
        targets += [
            Target(f"**.layers.{leaf}", p, "l d h k", layer="vit.layers.{l}.attention", module=module),
            Target(f"**.layers.*.{leaf}", p, "d h k", layer="vit.layers.{1}.attention", module=module),
        ]
    return tuple(targets)


def tunix_llama(projections: Sequence[str] = QV) -> tuple[Target, ...]:
    """The LLaMA 3 of tunix, and its Qwen: ``layers.0.attn.q_proj.w``, named as in transformers."""
    layer = "model.layers.{0}.self_attn"
    return tuple(Target(f"layers.*.attn.{p}_proj.w", p, "d h k", layer=layer) for p in _ordered(projections))


_FLAX = {"q": "query", "k": "key", "v": "value"}


def _ordered(projections: Sequence[str]) -> list[str]:
    if unknown := sorted(set(projections) - set("qkv")):
        raise HoraError(f"projections are among q, k and v, got {unknown}: write a Target for other maps (spec S3)")
    return [p for p in "qkv" if p in projections]
