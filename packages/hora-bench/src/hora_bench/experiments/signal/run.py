"""The gradient of every head on disjoint batches, before and after training, and what heads have in common in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Final

import numpy as np
from hora_spec import HoraError
from pydantic import Field

from hora_bench.backends import trained
from hora_bench.experiments.similarity.measures import factors_of
from hora_bench.methods import find
from hora_bench.models import load
from hora_bench.recipe import head_init
from hora_bench.request import Inputs, Request, vary
from hora_bench.setting import Setting
from hora_bench.store import Journal

from .measures import common_frame, jackknife, measure, plain_frame, products, rounded, unrelated

START: Final = "start"
PROJECTIONS: Final = {"q": 0, "v": 2}  # place in timm's fused qkv
MEASURED: Final = ("linear-probe", "hora", "lora")  # families
Layer = dict[str, np.ndarray]
NOTES: Final = tuple(
    """\
The signal is the mean gradient. It is estimated by products of gradients of disjoint batches, to which noise adds \
nothing on average, on examples that training has not seen; intervals are a jackknife over the batches (Student's t).
Similarity: mean inner product of the signals of two heads over that of a signal with itself; 1 if all heads are asked \
for the same. Coordinate by coordinate is what a generator of all heads sees. In a common frame Q is read through K, \
and V through the output map, since a head's own coordinates may be turned at will.
By chance: the same with every head's coordinates turned at random, 95 % of 100 draws.
Held: part of the signal in batches not looked at that lies in so many directions found in the others: one basis for \
all heads, one a head, one for all heads of Q and V. Random directions hold rank / width.
One model, the new head as drawn (start) or after the training named; nothing here is an accuracy.\
""".splitlines()
)


def signal(
    setting: Setting,
    *,
    tasks: Sequence[str] = (),
    methods: Sequence[str] = ("linear-probe", "lora"),
    seeds: Sequence[int] = (0,),
    batches: Annotated[int, Field(ge=6)] = 8,
    rank: Annotated[int, Field(ge=1)] = 8,
    journal: Journal | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure the signal at the start, and after training with each method.

    Parameters
    ----------
    setting
        Base request, on torch, and data.
    tasks
        Where it is measured; the base request's when there are none.
    methods
        ``"linear-probe"``, HoRA's methods and ``"lora"``; the start comes first by itself.
    seeds
        Of the new head, of training and of the batches.
    batches
        Disjoint, of all examples of training and validation that training does not see.
    rank
        Directions of a basis.
    journal, progress
        Finished pieces, and a callback with pieces done and in total.

    Returns
    -------
    dict
        ``setting``; ``summary``, means over layers with intervals, per task, state, seed, projection and measure;
        ``layers``, every number of every layer; ``notes``.

    Raises
    ------
    HoraError
        The request is not of a vision transformer on torch, or a method's updates are not known head by head.
    """
    base = setting.base
    setting.check_images()
    if base.backend != "torch":
        raise HoraError(f"signals are measured on torch, got backend {base.backend}: leave it out")
    others = [name for name in methods if find(name).family not in ("probe", *MEASURED[1:])]
    if others:
        raise HoraError(
            f"signals are measured after linear-probe, HoRA's methods and LoRA, got {', '.join(others)}: drop it"
        )
    journal, named = journal or Journal(None), tuple(tasks) or (base.task,)
    loaded = {name: setting.load(name) for name in named}
    states = [(name, state, seed) for name in named for state in (START, *methods) for seed in seeds]
    summary, layers = [], []
    for done, (name, state, seed) in enumerate(states, 1):
        asked = vary(base, task=name, method="linear-probe" if state == START else state, seed=seed)
        key = [state, batches, rank, asked.model_dump(), Inputs.of(asked, loaded[name]).model_dump()]
        measured = partial(_measured, asked, loaded[name], state == START, batches, rank)
        found = journal.once(key, measured)
        which = {"task": name, "state": state, "seed": seed}
        summary += [{**which, **one} for one in found[0]]
        layers += [{**which, **one} for one in found[1]]
        progress(done, len(states))
    return {
        "setting": {**base.model_dump(), "tasks": list(named), "seeds": list(seeds), "batches": batches, "rank": rank},
        "summary": summary,
        "layers": layers,
        "notes": list(NOTES),
    }


def _measured(asked: Request, task: Any, at_start: bool, batches: int, rank: int) -> list[Any]:
    """Means over layers with intervals, and the numbers of every layer."""
    model, seen = _model(asked, task, at_start=at_start)
    rest = np.setdiff1d(np.arange(task.size("train+val")), seen)
    if len(rest) < 2 * batches:
        raise HoraError(
            f"{batches} batches have two examples or more that training has not seen, got {len(rest)} in all: lower "
            "fraction or batches"
        )
    rows = np.array_split(np.random.default_rng(asked.seed).permutation(rest), batches)
    gradients = gradients_of(model, task, rows)
    frames = [frames_of(block) for block in model.blocks]

    def numbers(kept: np.ndarray) -> np.ndarray:
        """Layers, projections and measures."""
        found = [
            measure({p: value[kept] for p, value in own.items()}, frame, rank, kept % 2 == 0)
            for own, frame in zip(gradients, frames, strict=True)
        ]
        return np.array([[[*of.values()] for of in layer.values()] for layer in found])

    names = list(measure(gradients[0], frames[0], rank, np.arange(batches) % 2 == 0)["q"])
    whole = numbers(np.arange(batches))
    halves = jackknife(lambda kept: numbers(kept).mean(0), batches)
    chance = {p: _by_chance(gradients, frames, p, rank, asked.seed) for p in PROJECTIONS}
    summary = []
    for p, mean, half in zip(PROJECTIONS, whole.mean(0), halves, strict=True):
        for name, value, width in zip(names, mean, half, strict=True):
            one: dict[str, Any] = {"projection": p, "measure": name}
            one |= rounded({"mean": value, "low": value - width, "high": value + width})
            if name in chance[p]:
                one |= {"by_chance": [round(bound, 4) for bound in chance[p][name]]}
            summary.append(one)
    layers = [
        {"layer": layer, "projection": p, **rounded(dict(zip(names, found, strict=True)))}
        for layer, of in enumerate(whole)
        for p, found in zip(PROJECTIONS, of, strict=True)
    ]
    return [summary, layers]


def _by_chance(
    gradients: Sequence[Layer], frames: Sequence[Layer], p: str, rank: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Ranges of what a projection would show if its heads had nothing in common, and random directions."""
    _, heads, head_dim, embed = gradients[0][p].shape
    of = [products(own[p]) for own in gradients]
    plain, framed = unrelated(of, [(plain_frame(heads, head_dim), frame[p]) for frame in frames], seed)
    random = {"inputs": rank / embed, "outputs": rank / head_dim}
    return {
        "similarity": plain,
        "similarity_in_frame": framed,
        **{f"inputs_{name}": (random["inputs"],) * 2 for name in ("one", "own", "together")},
        **{f"outputs_{name}": (random["outputs"],) * 2 for name in ("one", "own")},
    }


def _model(asked: Request, task: Any, *, at_start: bool) -> tuple[Any, np.ndarray]:
    """The base with the updates and the head that training found, and the numbers of the examples that it saw."""
    import torch

    size, head = asked.image_size_px or 0, head_init(load.num_features(asked.model), task.num_classes, asked.seed)
    model = load.timm_vit(asked.model, size, head)
    if at_start:
        return model, np.array([], int)
    learner, members, _ = trained(asked, task)
    parameters = dict(learner.model.named_parameters())
    with torch.no_grad():
        for name in ("weight", "bias"):
            (found,) = (value for key, value in parameters.items() if key.endswith(f"head.{name}") or _own(key, name))
            getattr(model.head, name).copy_(found)
        if find(asked.method).family != "probe":
            for (layer, p), factors in factors_of(learner.model).items():
                a, b = torch.from_numpy(factors.a), torch.from_numpy(factors.b)
                model.blocks[layer].attn.qkv.weight.view(3, *b.shape[:2], -1)[PROJECTIONS[p]] += b @ a
    return model, members


def _own(key: str, name: str) -> bool:
    """Whether a parameter is the head that PEFT trains beside the one it keeps."""
    return key.endswith(f"head.modules_to_save.default.{name}")


def gradients_of(model: Any, task: Any, rows: Sequence[np.ndarray]) -> list[Layer]:
    """Per layer and projection ``(batches, heads, head_dim, embed)``, of the mean loss of each batch."""
    import torch

    weights = [block.attn.qkv.weight for block in model.blocks]
    heads = model.blocks[0].attn.num_heads
    found: list[list[np.ndarray]] = [[] for _ in weights]
    for own in rows:
        batch = task.train_batch("train+val", own, np.random.default_rng(0))
        images = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)
        loss = torch.nn.functional.cross_entropy(model(images), torch.from_numpy(batch["label"]).long())
        for kept, gradient in zip(found, torch.autograd.grad(loss, weights), strict=True):
            kept.append(gradient.double().numpy())
    stacked = [np.stack(kept).reshape(len(rows), 3, heads, -1, kept[0].shape[-1]) for kept in found]
    return [{p: value[:, place] for p, place in PROJECTIONS.items()} for value in stacked]


def frames_of(block: Any) -> Layer:
    """Frames in which heads of Q and of V can be compared: what K reads, and what the output map writes."""
    heads = block.attn.num_heads
    key = block.attn.qkv.weight.detach().double().numpy().reshape(3, heads, -1, block.attn.qkv.in_features)[1]
    out = block.attn.proj.weight.detach().double().numpy()
    gamma = getattr(block.ls1, "gamma", None)
    out = out if gamma is None else gamma.detach().double().numpy()[:, None] * out
    return {"q": common_frame(key), "v": common_frame(out.T.reshape(heads, -1, len(out)))}
