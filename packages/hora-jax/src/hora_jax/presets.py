"""Targets of known models, by the names and layouts their authors chose.

Every function returns a tuple of `Target`, and takes `projections`, a choice among q, k and v. Layers carry the names
that the same model has in PyTorch, where it exists there.
"""

from collections.abc import Sequence

from hora_spec import HoraError, Layout, Window

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
    layer = None if stack_axis is None else "{0}.{l}"
    pattern = _stacked(["d", "h", "k"], stack_axis)
    return tuple(Target(f"**.{_FLAX[p]}.kernel", p, pattern, layer=layer) for p in _ordered(projections))


def equinox(projections: Sequence[str] = QV, *, stack_axis: int | None = None) -> tuple[Target, ...]:
    """`equinox.nn.MultiheadAttention`, wherever it is: ``query_proj.weight`` as in PyTorch's `Linear`.

    Parameters
    ----------
    projections
        Among q, k and v.
    stack_axis
        Axis of the weights that `equinox.filter_vmap` has added when it made a stack of layers, 0 unless it was told
        another. Layers are then named ``<path>.<place>``.
    """
    layer = None if stack_axis is None else "{0}.{l}"
    pattern = _stacked(["(h k)", "d"], stack_axis)
    return tuple(
        Target(f"**.{_FLAX[p]}_proj.weight", p, pattern, "num_heads", layer=layer) for p in _ordered(projections)
    )


def equimo_vit(projections: Sequence[str] = QV) -> tuple[Target, ...]:
    """The ViT of equimo: ``blocks.0.blocks.3.attn.qkv.weight``, named as in timm, ``blocks.3.attn``.

    Parameters
    ----------
    projections
        Among q, k and v.

    Notes
    -----
    timm has no chunks of blocks. Of a model with several, layers would have one name twice, which `make_plan` refuses.
    """
    path, layer = "**.blocks.*.blocks.*.attn.qkv.weight", "{0}.blocks.{2}.attn"
    return tuple(
        Target(path, p, "(h k) d", "num_heads", ("qkv".index(p), 3), layer=layer) for p in _ordered(projections)
    )


def tunix(projections: Sequence[str] = QV, *, layers: str = "model.layers") -> tuple[Target, ...]:
    """The models of tunix, Llama 3, Qwen 2 and 3, Gemma 1 to 4: ``layers.0.attn.q_proj.w``, or its fused einsums.

    Parameters
    ----------
    projections
        Among q, k and v.
    layers
        Where the model's layers are in transformers, ``model.language_model.layers`` for those that also see. Their
        rows lie as in transformers, so adapters are exchanged.
    """
    targets, layer = [], layers + ".{0}.self_attn"
    for p in _ordered(projections):
        module = f"{p}_proj"
        targets += [
            Target(f"layers.*.attn.{module}.w", p, "d h k", layer=layer),
            Target(f"layers.*.attn.{p}_einsum.w", p, "h d k", layer=layer, module=module),
        ]
        for fused in ("qkv", "kv"):
            if p in fused:
                part = Window(0, fused.index(p), fused.index(p) + 1)
                path, layout = f"layers.*.attn.{fused}_einsum.w", Layout("1 h d k", part)
                targets.append(Target(path, p, layout, layer=layer, module=module))
    return tuple(targets)


def maxtext(projections: Sequence[str] = QV, *, block: int | None = None, stack_axis: int = 1) -> tuple[Target, ...]:
    """The models of MaxText: ``decoder.layers_0.self_attention.query.kernel``, or scanned over ``decoder.layers``.

    Parameters
    ----------
    projections
        Among q, k and v.
    block
        Number of layers in each step of the scan where that is a block, ``layers.layers_0 ...``, as of Gemma 3 (6).
    stack_axis
        MaxText's ``param_scan_axis``.

    Notes
    -----
    Layers have the names of the model that is not scanned. They are none of transformers, on purpose: MaxText stores
    queries divided by ``sqrt(head_dim)``, and those of LLaMA with pairs of rotary rows side by side, so that the same
    factors are another update there. Merge, and convert the merged checkpoint with MaxText's own command.
    """
    stacked, targets = _stacked(["d", "h", "k"], stack_axis), []
    for p in _ordered(projections):
        leaf = f"self_attention.{_FLAX[p]}.kernel"
        if block is None:
            targets += [
                Target(f"**.layers_*.{leaf}", p, "d h k"),
                Target(f"**.layers.{leaf}", p, stacked, layer="{0}.layers_{l}.self_attention"),
            ]
            continue
        targets.append(Target(f"**.layers_remainder.layers_*.{leaf}", p, "d h k"))
        for i in range(block):
            name = f"{{0}}.layers_{{l*{block}+{i}}}.self_attention"
            targets.append(Target(f"**.layers.layers_{i}.{leaf}", p, stacked, layer=name))
    return tuple(targets)


_FLAX = {"q": "query", "k": "key", "v": "value"}


def _stacked(axes: list[str], stack_axis: int | None) -> str:
    """The pattern of these axes, with that of stacked layers where it was added."""
    if stack_axis is None:
        return " ".join(axes)
    if not -len(axes) - 1 <= stack_axis <= len(axes):
        raise HoraError(f"a stack of weights has {len(axes) + 1} axes, got stack_axis={stack_axis} (spec L1)")
    place = stack_axis % (len(axes) + 1)
    return " ".join([*axes[:place], "l", *axes[place:]])


def _ordered(projections: Sequence[str]) -> list[str]:
    if unknown := sorted(set(projections) - set("qkv")):
        raise HoraError(f"projections are among q, k and v, got {unknown}: write a Target for other maps (spec S3)")
    return [p for p in "qkv" if p in projections]
