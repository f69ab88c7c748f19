"""Parameters and MACs of every method, by hand: what the mathematics asks for.

Letters as in the specification: r rank, m hidden, e head_embed, and per projection H heads of d rows and D inputs.
One MAC is two FLOPs. Elementwise work is not counted, as in torch's counter.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple, get_args

from hora_spec import AdapterSpec, HoraError, LayerShape, ProjectionShape
from hora_spec import count_params as hora_params

from .architectures import Transformer, Workload

PeerName = Literal["lora", "dora", "vera"]
Route = Literal["branch", "merge", "dense"]


@dataclass(frozen=True, slots=True)
class Peer:
    """A method of PEFT's at its defaults on Q and V."""

    name: PeerName
    rank: int


Method = Peer | AdapterSpec


class Macs(NamedTuple):
    """MACs of a forward and of a backward pass."""

    forward: int
    backward: int

    @property
    def train(self) -> int:
        """MACs of both."""
        return self.forward + self.backward


def methods(rank: int) -> dict[str, Method]:
    """Every method at one rank: PEFT's peers, the paper's reading, and all variants the specification allows."""
    found: dict[str, Method] = {name: Peer(name, rank) for name in get_args(PeerName)}
    found["hora-paper"] = AdapterSpec.paper(rank)
    sharings, sources = ("full", "a", "b", "none"), ("direct", "hypernetwork")
    for sharing, a_source, residual in product(sharings, sources, (False, True)):
        try:
            spec = AdapterSpec(rank, sharing=sharing, a_source=a_source, residual=residual)
        except HoraError:  # contradictions are the specification's to name
            continue
        parts = {f"-share-{sharing}": sharing != "full", "-hyper-a": spec.generates_a, "-residual": residual}
        name = "hora" + "".join(part for part, present in parts.items() if present)
        found["mh-lora" if sharing == "none" else name] = spec
    return found


def routes(method: Method) -> tuple[Route, ...]:
    """Ways to compute an adapted projection; peers have one."""
    return ("branch", "merge", "dense") if isinstance(method, AdapterSpec) else ("branch",)


def params_count(method: Method, model: Transformer) -> int:
    """Trainable parameters in all layers.

    LoRA ``r (D + H d)`` per projection; DoRA one magnitude per row more; VeRA ``r + H d``, its matrices being frozen
    and random; HoRA as the specification says (rule S6).
    """
    if isinstance(method, AdapterSpec):
        return model.num_layers * hora_params(method, model.layer)
    rank = method.rank
    per_projection = {
        "lora": lambda rows, columns: rank * (rows + columns),
        "dora": lambda rows, columns: rank * (rows + columns) + rows,
        "vera": lambda rows, _: rank + rows,
    }[method.name]
    return model.num_layers * sum(per_projection(*shape.weight_shape) for shape in model.layer.values())


def generation_macs(spec: AdapterSpec, layer: LayerShape) -> int:
    """MACs of generating the factors of one layer, once per pass however many tokens it has.

    Generated B: ``m e r`` per head embedding for the first layer, shared by projections with equal head counts, and
    ``m r d`` per head for the second. Generated A: ``m r D`` per projection; its first layer is elementwise.
    """
    total = 0
    if spec.generates_b:
        total += spec.hidden_dim * spec.rank * sum(shape.weight_shape[0] for shape in layer.values())
        head_counts = {shape.num_heads for shape in layer.values()}
        total += spec.hidden_dim * spec.head_embed_dim * spec.rank * sum(head_counts)
    if spec.generates_a:
        total += spec.hidden_dim * spec.rank * sum(shape.embed_dim for shape in layer.values())
    return total


def adapter_macs(method: Method, model: Transformer, load: Workload, route: Route = "branch") -> Macs:
    """MACs that the adapters of all layers add to the frozen model.

    Parameters
    ----------
    method, model, load
        What is computed.
    route
        ``"branch"`` adds ``(x A^T) B^T``. ``"merge"`` forms ``W + B A`` forward and again backward, with low-rank
        gradients. ``"dense"`` forms ``B A`` and lets automatic differentiation form its dense gradient: the
        accounting of the paper.
    """
    first, later = (layer_macs(method, model.layer, load.tokens, route, input_grad=i) for i in (False, True))
    others = model.num_layers - 1
    return Macs(first.forward + others * later.forward, first.backward + others * later.backward)


def layer_macs(method: Method, layer: LayerShape, tokens: int, route: Route, *, input_grad: bool) -> Macs:
    """MACs that an adapter adds to one layer; the input of the first layer asks for no gradient."""
    parts = [_projection_macs(method, shape, tokens, route, input_grad=input_grad) for shape in layer.values()]
    generation = generation_macs(method, layer) if isinstance(method, AdapterSpec) else 0
    return Macs(generation + sum(p.forward for p in parts), 2 * generation + sum(p.backward for p in parts))


def _projection_macs(method: Method, shape: ProjectionShape, tokens: int, route: Route, *, input_grad: bool) -> Macs:
    rows, columns = shape.weight_shape
    own_a = isinstance(method, AdapterSpec) and not method.shares_a
    rank = method.rank * (shape.num_heads if own_a else 1)
    down = tokens * rank * columns  # x A^T; the same again for A's gradient, and for the input's
    up = tokens * method.rank * rows  # (x A^T) B^T; the same again for B's gradient, and for that of x A^T
    form = method.rank * rows * columns  # B A
    if route == "merge":
        return Macs(form, down + 2 * up + down + form * input_grad)
    if route == "dense":
        return Macs(form, tokens * rows * columns + 2 * form)
    if isinstance(method, Peer) and method.name == "vera":
        return Macs(down + up, up + down * input_grad)
    norm = rank * columns * (columns + rows) if isinstance(method, Peer) and method.name == "dora" else 0
    return Macs(norm + down + up, 2 * up + down + down * input_grad)
