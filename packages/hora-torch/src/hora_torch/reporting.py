"""A table of what was adapted."""

import math

from hora_spec import generated_share, layer_from_json
from torch import nn

from hora_torch.hypernet import HoraHypernet
from hora_torch.layer import HoraLayer
from hora_torch.sharding import is_sharded

_HEADER = ("layer", "projections (heads x head_dim x embed)", "rank", "sharing", "generated", "parameters")


def report(model: nn.Module) -> str:
    """What was adapted, one line per layer, equal layers together; print it.

    Parameters
    ----------
    model
        A ``PeftModel``, or a model into which adapters were injected.

    Returns
    -------
    str
        A table for each adapter with its number of trainable values beside that of the base model. ``generated`` is the
        part of B's squared norm that the hypernetwork generates, a residual the rest (spec G8); it is open while B is
        zero.
    """
    names = sorted(
        {name for module in model.modules() if isinstance(module, HoraLayer) for name in module.hora_attached}
    )
    base = sum(param.numel() for key, param in model.named_parameters() if ".hora_hyper." not in key)
    return "\n\n".join(_adapter_report(model, name, base) for name in names)


def _adapter_report(model: nn.Module, adapter_name: str, base: int) -> str:
    found = [
        module.hora_hyper[adapter_name]
        for module in model.modules()
        if isinstance(module, HoraLayer) and adapter_name in module.hora_hyper
    ]
    sizes = {hypernet.name: sum(math.prod(p.shape) for p in hypernet.parameters()) for hypernet in found}
    shares = {hypernet.name: _generated(hypernet) for hypernet in found}
    groups: dict[tuple[str, ...], list[str]] = {}
    for entry in model.peft_config[adapter_name].hora_layers:
        name, spec, sites = layer_from_json(entry)
        shapes = {p: site.projection for p, site in sites.items()}
        text = ", ".join(f"{p} {s.num_heads}x{s.head_dim}x{s.embed_dim}" for p, s in sorted(shapes.items()))
        row = (text, str(spec.rank), spec.sharing, shares[name], f"{sizes[name]:,}")
        groups.setdefault(row, []).append(name)
    rows = [
        (names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more", *row)
        for row, names in groups.items()
    ]
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (_HEADER, *rows)
    ]
    total = sum(sizes.values())
    return "\n".join(
        [
            f"HoRA adapter {adapter_name!r}: {total:,} parameters beside {base:,} of the base ({total / base:.3%})",
            *lines,
        ]
    )


def _generated(hypernet: HoraHypernet) -> str:
    if not hypernet.spec.residual:
        return "all" if hypernet.spec.generates_b else "none"
    params = hypernet.params()
    if any(param.is_meta or is_sharded(param) for param in params.values()):
        return "elsewhere"
    arrays = {key: param.detach().float().cpu().numpy() for key, param in params.items()}
    shares = generated_share(hypernet.spec, hypernet.layer, arrays)
    return ", ".join(f"{p} {'open' if math.isnan(share) else f'{share:.0%}'}" for p, share in shares.items())
