"""All costs in one result: by hand, by torch, by XLA, and how the paper's figures come about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from hora_spec import AdapterSpec

from .architectures import MODELS, Transformer, Workload
from .formulas import (
    Macs,
    Method,
    Peer,
    Route,
    adapter_macs,
    generation_macs,
    layer_macs,
    methods,
    params_count,
    routes,
)

NOTES: Final = tuple(
    """\
One MAC is two FLOPs; the paper's G are MACs. Elementwise work is not counted by hand and by torch, and is by XLA.
MACs are not time: see hora-bench speed.
Attention is counted in full, causal or not. Backward is what automatic differentiation computes for a frozen base.
The paper does not say how it counted: one token, rank 32 on Q and V and a dense delta are inferred from its figures.
LoRA comes to 6.624 G, the paper has 6.63 G: 1 to 9 M MACs of elementwise work would reconcile this and 41.32 G.
torch computes the first layer of the generator once per projection, the count by hand once per layer.
torch applies an A of its own per head (share-b, mh-lora) as one block-diagonal matrix, the count by hand head by head.
The merge route of JAX does not form W + B A again in backward, that of torch and the count by hand do.\
""".splitlines()
)


def cost(
    models: Sequence[str] = tuple(MODELS),
    *,
    rank: int | None = None,
    torch: bool = True,
    xla: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Trainable parameters and MACs of every method, without weights.

    Parameters
    ----------
    models
        Names among ``MODELS``.
    rank
        Of every method; None takes 8 for vision and 32 for language models.
    torch, xla
        Whether to count with the frameworks too.
    progress
        Called with models done and in total.

    Returns
    -------
    dict
        ``models``; ``params`` and ``macs``, one record per method, and per method, route and workload; ``xla``, the
        adapted projections of one layer; ``paper``, its figures step by step; ``notes``.
    """
    result: dict[str, Any] = {"models": [], "params": [], "macs": [], "xla": [], "paper": paper(), "notes": list(NOTES)}
    for done, name in enumerate(models):
        progress(done, len(models))
        model = MODELS[name]
        chosen = methods(rank or model.rank)
        counted = _torch_counts(model, chosen) if torch else {}
        result["models"].append(
            {
                "model": name,
                "params_count": model.params_count,
                "layers": model.num_layers,
                "embed": model.embed_dim,
                "heads": model.num_heads,
                "kv_heads": model.num_kv_heads,
                "rank": rank or model.rank,
            }
        )
        for method_name, method in chosen.items():
            count = params_count(method, model)
            result["params"].append(
                {
                    "model": name,
                    "method": method_name,
                    "params_count": count,
                    "params_pct": round(100 * count / model.params_count, 4),
                    "spec": method.to_dict() if isinstance(method, AdapterSpec) else None,
                }
            )
        result["macs"] += [{"model": name, **record} for record in _macs(model, chosen, counted)]
        result["xla"] += [{"model": name, **record} for record in (_xla_counts(model, chosen) if xla else [])]
    return result


def paper() -> list[dict[str, Any]]:
    """How 41.32 G against 6.63 G comes about: LLaMA-7B, one token, rank 32 on Q and V; MACs, and the paper's figure."""
    model, spec, lora = MODELS["llama-7b"], AdapterSpec.paper(32), Peer("lora", 32)
    one, many = Workload(1, 1), Workload(1, 2048)
    base = model.forward_macs(one)
    generation = model.num_layers * generation_macs(spec, model.layer)
    low_rank = adapter_macs(lora, model, one).forward
    dense = adapter_macs(spec, model, one, "dense").forward
    branch = adapter_macs(spec, model, one).forward
    share = 100 * adapter_macs(spec, model, many).forward / model.forward_macs(many)
    steps = (
        ("frozen model: weight matrices and attention", base, None),
        ("LoRA: + (x A^T) B^T", base + low_rank, 6.63e9),
        ("HoRA: + generating the factors", base + generation, None),
        ("HoRA: + dense delta B A of Q and V in 32 layers", base + dense, 41.32e9),
        ("HoRA by branch: the factors, then (x A^T) B^T", base + branch, None),
        ("HoRA in evaluation: factors kept", base + low_rank, None),
        ("HoRA merged", base, None),
    )
    return [
        *({"step": step, "tokens": 1, "macs": macs, "paper_macs": stated} for step, macs, stated in steps),
        {
            "step": f"HoRA by branch over 2048 tokens (+{share:.2f} % of the frozen model)",
            "tokens": many.tokens,
            "macs": model.forward_macs(many) + adapter_macs(spec, model, many).forward,
            "paper_macs": None,
        },
        {
            "step": "trainable parameters",
            "tokens": None,
            "params_count": params_count(spec, model),
            "params_pct": round(100 * params_count(spec, model) / model.params_count, 4),
            "paper_params_pct": 0.09,
        },
    ]


def _macs(
    model: Transformer, chosen: dict[str, Method], counted: dict[tuple[str, Route, Workload], Macs]
) -> Iterable[dict[str, Any]]:
    """Records of the frozen model and of what each method adds to it."""
    for load in model.workloads:
        base = Macs(model.forward_macs(load), model.backward_macs(load))
        where = {"batch": load.batch, "seq": load.seq, "tokens": load.tokens}
        yield {"method": "frozen", "route": None, **where, **_named("", base)}
        for name, method in chosen.items():
            for route in routes(method):
                added = adapter_macs(method, model, load, route)
                record = {"method": name, "route": route, **where, **_named("added_", added)}
                record["added_forward_pct"] = round(100 * added.forward / base.forward, 4)
                record["added_train_pct"] = round(100 * added.train / base.train, 4)
                if found := counted.get((name, route, load)):
                    difference = Macs(found.forward - base.forward, found.backward - base.backward)
                    record |= _named("torch_added_", difference)
                yield record


def _torch_counts(model: Transformer, chosen: dict[str, Method]) -> dict[tuple[str, Route, Workload], Macs]:
    """Whole models by torch's counter: two and three layers counted, the others being like the third."""
    from hora_bench.experiments.cost.counted import adapted, build, count_macs

    shallow = []
    for layers in (2, 3):
        base = build(replace(model, num_layers=layers))
        counts = {}
        for name, method in chosen.items():
            for route in (route for route in routes(method) if route != "dense"):
                with adapted(base, method, route) as tuned:
                    counts |= {(name, route, load): count_macs(tuned, load) for load in model.workloads}
        shallow.append(counts)
    two, three = shallow
    deeper = model.num_layers - 2
    return {
        key: Macs(*(low + deeper * (high - low) for low, high in zip(two[key], three[key], strict=True))) for key in two
    }


def _xla_counts(model: Transformer, chosen: dict[str, Method]) -> Iterable[dict[str, Any]]:
    """Adapted projections of one layer by XLA's cost analysis, beside the count by hand."""
    from hora_bench.experiments.cost.counted import count_layer_macs

    weights = sum(rows * columns for rows, columns in (shape.weight_shape for shape in model.layer.values()))
    for load in model.workloads:
        for name, method in chosen.items():
            if isinstance(method, Peer):
                continue
            for route in ("branch", "merge"):
                added = layer_macs(method, model.layer, load.tokens, route, input_grad=True)
                hand = Macs(*(weights * load.tokens + one for one in added))
                found = count_layer_macs(method, model.layer, load.tokens, route)
                yield {
                    "method": name,
                    "route": route,
                    "tokens": load.tokens,
                    **_named("", hand),
                    **_named("xla_", found),
                }


def _named(prefix: str, macs: Macs) -> dict[str, int]:
    return {f"{prefix}forward_macs": macs.forward, f"{prefix}backward_macs": macs.backward}
