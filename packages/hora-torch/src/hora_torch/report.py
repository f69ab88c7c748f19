"""A table of what was adapted."""

import math

from hora_spec import layer_from_json
from torch import nn

from hora_torch.layer import HoraLayer

_HEADER = ("layer", "projections (heads x head_dim x embed)", "rank", "sharing", "parameters")


def report(model: nn.Module) -> str:
    """What was adapted, one line per layer, equal layers together; print it.

    Parameters
    ----------
    model
        A ``PeftModel``, or a model into which adapters were injected.

    Returns
    -------
    str
        A table for each adapter with its number of trainable values beside that of the base model.
    """
    names = sorted(
        {name for module in model.modules() if isinstance(module, HoraLayer) for name in module.hora_attached}
    )
    base = sum(param.numel() for key, param in model.named_parameters() if ".hora_hyper." not in key)
    return "\n\n".join(_adapter_report(model, name, base) for name in names)


def _adapter_report(model: nn.Module, adapter_name: str, base: int) -> str:
    sizes = {
        module.hora_hyper[adapter_name].name: sum(
            math.prod(p.shape) for p in module.hora_hyper[adapter_name].parameters()
        )
        for module in model.modules()
        if isinstance(module, HoraLayer) and adapter_name in module.hora_hyper
    }
    groups: dict[tuple[str, ...], list[str]] = {}
    for entry in model.peft_config[adapter_name].hora_layers:
        name, spec, sites = layer_from_json(entry)
        shapes = {p: site.projection for p, site in sites.items()}
        text = ", ".join(f"{p} {s.num_heads}x{s.head_dim}x{s.embed_dim}" for p, s in sorted(shapes.items()))
        groups.setdefault((text, str(spec.rank), spec.sharing, f"{sizes[name]:,}"), []).append(name)
    rows = [
        (found[0] if len(found) == 1 else f"{found[0]} and {len(found) - 1} more", *row)
        for row, found in groups.items()
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
