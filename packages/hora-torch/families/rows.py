"""Whether the rows and heads of a plan are those of the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from family import Family, noise, outputs
from hora_spec import Site
from oracle import Call, Part, attend, reach, verdict
from torch import nn

Layers = Mapping[str, Mapping[str, Site]]


@dataclass(frozen=True, slots=True)
class Question:
    """A model, inputs of it, and the sites by projection that are said to be adapted, by layer."""

    family: Family
    model: nn.Module
    inputs: Mapping[str, Any]
    layers: Layers


def rows_and_heads(asked: Question) -> str:
    """Whether each adapted row belongs to the projection and the head that it is said to belong to."""
    answers, unlike = [_read_heads(asked)], asked.family.unlike_attention
    for layer, sites in asked.layers.items():
        parts = [part(name, site) for name, site in sites.items()]
        embed = next(iter(sites.values())).projection.embed_dim
        answers.append(f"unseen: {unlike}" if unlike else _seen(asked, "" if layer == "." else layer, parts, embed))
    return min(answers, key=lambda answer: ("WRONG", "unseen", "ok").index(answer.partition(":")[0]))


def part(projection: str, site: Site) -> Part:
    """The rows of a site, with the role that the name of the projection says or ends with."""
    role = projection.rpartition("_")[2]
    rows, shape = site.layout.rows(site.weight_shape).positions.tolist(), site.projection
    name = f"{site.module}.{site.parameter}"
    return Part(role if role in ("q", "k", "v") else None, name, rows, shape.num_heads, shape.head_dim)


def summary(layers: Layers) -> str:
    """Modules and heads, as ``q_proj: q 4x8``."""
    return ", ".join(
        dict.fromkeys(
            f"{site.module.rpartition('.')[2]}: {name} {site.projection.num_heads}x{site.projection.head_dim}"
            for sites in layers.values()
            for name, site in sites.items()
        )
    )


def _seen(asked: Question, layer: str, parts: list[Part], embed: int) -> str:
    """By the inputs of the family, else by a call of the attention module alone."""
    owner, weights = asked.model.get_submodule(layer), {part.weight for part in parts}
    alone = [noise(2, 5, embed), noise(2, 4, 4, embed)]
    calls: list[Call] = [lambda model: outputs(model, asked.inputs)]
    calls += [lambda _, hidden=hidden: attend(owner, hidden) for hidden in alone]
    answer = "unseen: it cannot be called alone"
    for call in calls:
        try:
            found = reach(asked.model, call, layer, weights)
        except Exception:  # of whatever kind: called alone, its arguments are guessed
            continue
        if found:
            answer = verdict(found, parts)
        if not answer.startswith("unseen"):
            break
    return answer


def _read_heads(asked: Question) -> str:
    """Against what was read in the source."""
    for role, expected in asked.family.heads.items():
        shapes = [site.projection for sites in asked.layers.values() for name, site in sites.items() if name == role]
        found = {(shape.num_heads, shape.head_dim) for shape in shapes}
        if not found <= expected:
            return f"WRONG: {role} has {sorted(expected)} heads x width, adapted as {sorted(found - expected)}"
    return "ok"
