"""From names to shapes: which modules of a model are adapted, in which layer, with how many heads."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hora_spec import (
    AdapterSpec,
    HoraError,
    LayerShape,
    Layout,
    ProjectionShape,
    Site,
    Window,
    layer_from_json,
    layer_to_json,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hora_torch.config import HoraConfig
from hora_torch.heads import FUSED, ROLE_OF, ROLES, Heads, is_interleaved, matches


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The projections of one attention module, and the module that will own their hypernetwork."""

    name: str
    spec: AdapterSpec
    sites: Mapping[str, Site]

    @property
    def leader(self) -> str:
        """Path of the first target in model order."""
        return next(iter(self.sites.values())).module

    @property
    def shape(self) -> LayerShape:
        """Shapes of the projections."""
        return LayerShape({p: site.projection for p, site in self.sites.items()})

    @property
    def modules(self) -> list[str]:
        """Paths of the adapted modules, in model order."""
        return list(dict.fromkeys(site.module for site in self.sites.values()))

    def to_json(self) -> dict[str, Any]:
        """Entry of ``hora_layers`` in ``adapter_config.json`` (spec F2)."""
        return layer_to_json(self.name, self.spec, self.sites)


class NoTargetError(HoraError, NoMatchingPeftModuleError):
    """No module of the model matches ``target_modules``."""


def plan(model: nn.Module, names: Iterable[str], config: HoraConfig) -> list[LayerPlan]:
    """Group targets into layers and find their head counts.

    Parameters
    ----------
    model
        The base model, which may hold adapters already.
    names
        Paths of the target modules, in model order.
    config
        Head counts where the model does not tell, ranks, and the method.

    Returns
    -------
    list of LayerPlan
        In model order of the leaders.

    Raises
    ------
    HoraError
        If a module cannot be a target, its head count is unknown or does not fit, targets of one layer differ in rank
        or alpha, or a loaded adapter was made for another model.
    """
    if config.recorded is not None:
        return _recorded_plan(model, names, config)
    layers: dict[str, list[tuple[str, Site]]] = {}
    for name in names:
        module = base_module(model.get_submodule(name))
        parent = name if isinstance(module, nn.MultiheadAttention) else name.rpartition(".")[0]
        layers.setdefault(parent or ".", []).extend(_sites(model, name, module, config))
    return [LayerPlan(name, _layer_spec(name, found, config), _unique(found)) for name, found in layers.items()]


def _recorded_plan(model: nn.Module, names: Iterable[str], config: HoraConfig) -> list[LayerPlan]:
    """The layers that a loaded adapter describes, checked against the model (spec F5)."""
    plans = [LayerPlan(*layer_from_json(entry)) for entry in config.recorded]
    recorded, names = {module for layer in plans for module in layer.modules}, set(names)
    if recorded != names:
        raise HoraError(
            f"a loaded adapter fits its own base model, missing here: {sorted(recorded - names)[:3]}, not in the "
            f"adapter: {sorted(names - recorded)[:3]}: load the base model it was trained on (spec F5)"
        )
    for layer in plans:
        for site in layer.sites.values():
            weight = getattr(base_module(model.get_submodule(site.module)), site.parameter, None)
            shape = None if weight is None else tuple(weight.shape)
            if shape != site.weight_shape and weight is not None and weight.is_floating_point():
                raise HoraError(
                    f"{site.module}.{site.parameter} must have shape {site.weight_shape}, got {shape}: load the base "
                    "model the adapter was trained on (spec F5)"
                )
        expected = _layer_spec(layer.name, list(layer.sites.items()), config)
        if (layer.spec.replace(alpha=None), layer.spec.scaling) != (expected.replace(alpha=None), expected.scaling):
            raise HoraError(
                f"the config of a loaded adapter is not changed, {layer.name!r} was trained with {layer.spec}, got "
                f"{expected}: for a new adapter write a new HoraConfig"
            )
    return plans


def default_targets(model: nn.Module, config: HoraConfig) -> set[str]:
    """Names that select the query and value projections of every attention module of `model`."""
    chosen, others = [], []
    for name, module in model.named_modules():
        module = base_module(module)
        (chosen if name and _is_default(model, name, module, config) else others).append(name)
    short = {name.rpartition(".")[2] for name in chosen}
    if any(name.rpartition(".")[2] in short for name in others):
        return set(chosen)
    return short


def no_match(model: nn.Module, config: HoraConfig) -> NoTargetError:
    """The error for targets that match nothing, with the closest module names."""
    wanted = config.target_modules
    if not wanted:
        return NoTargetError(
            "Please specify `target_modules`: no attention module with a known head count was found; name its modules, "
            "and pass num_heads if the model does not tell"
        )
    names = [name for name, module in model.named_modules() if name and _is_supported(base_module(module))]
    last = {name.rpartition(".")[2] for name in names}
    wishes = [wanted] if isinstance(wanted, str) else sorted(wanted or ())
    close = [match for wish in wishes for match in difflib.get_close_matches(wish, [*sorted(last), *names], 5, 0.4)]
    message = f"Target modules {wanted} not found in the base model."
    for key in ("layers_to_transform", "layers_pattern"):
        if getattr(config, key) is not None:
            message += f" Note: you specified '{key}': {getattr(config, key)}."
    return NoTargetError(
        f"{message} Closest module names: {list(dict.fromkeys(close)) or sorted(last)[:20]}; name Linear, Conv1D or "
        "MultiheadAttention modules"
    )


def targets_of(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Modules that a state dict adapts: its leaders, and their siblings that play a role the leader generates for."""
    projections: dict[str, set[str]] = {}
    for key in state_dict:
        leader, found, param = key.removeprefix("base_model.model.").partition(".hora_hyper.")
        if found:
            roles = projections.setdefault(leader.removeprefix("_orig_mod."), set())
            if "." in param:
                roles.add(param.rpartition(".")[2])
    chosen: set[str] = set()
    for leader, roles in projections.items():
        chosen.add(leader)
        if isinstance(base_module(model.get_submodule(leader)), nn.MultiheadAttention):
            continue
        parent = leader.rpartition(".")[0]
        own_names = {name for role in roles for name in ROLES.get(role, ())}
        for child, _ in model.get_submodule(parent).named_children():
            if child in own_names or identifier(child) in roles or (child in FUSED and leader.endswith(child)):
                chosen.add(f"{parent}.{child}" if parent else child)
    return [name for name, _ in model.named_modules() if name in chosen]


def base_module(module: nn.Module) -> nn.Module:
    """The module beneath any adapters."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _sites(model: nn.Module, name: str, module: nn.Module, config: HoraConfig) -> Iterator[tuple[str, Site]]:
    if isinstance(module, nn.MultiheadAttention):
        yield from _multihead_sites(name, module, config)
        return
    parent_name, _, own = name.rpartition(".")
    parent = base_module(model.get_submodule(parent_name))
    if not _is_supported(module) or isinstance(parent, nn.MultiheadAttention):
        raise HoraError(
            f"targets are Linear, Conv1D and MultiheadAttention modules, got {type(module).__name__} at {name!r}"
            + (": its forward is never called, target the MultiheadAttention" if _is_supported(module) else "")
        )
    rows, embed = out_in(module)
    transposed = isinstance(module, Conv1D)
    shape = (embed, rows) if transposed else (rows, embed)
    pattern, axis = ("d (h k)", 1) if transposed else ("(h k) d", 0)
    heads = Heads.find(model, parent, name, config)
    if own in FUSED and heads.query:
        if is_interleaved(parent, module, own):
            raise HoraError(
                f"a fused weight is adapted when its rows are all of q, then k, then v, got another order in {name!r} "
                f"of {type(parent).__name__}: leave it out of target_modules"
            )
        for part, start, width, count in heads.split(name, own, rows, getattr(parent, "is_cross_attention", False)):
            if part in config.fused_projections:
                projection = ProjectionShape(count, width // count, embed)
                yield part, Site(name, "weight", shape, Layout(pattern, Window(axis, start, start + width)), projection)
        return
    role = ROLE_OF.get(own)
    count = heads.of(role)
    if not count or rows % count:
        raise HoraError(
            f"the head count of {name!r} must be known and divide its {rows} output rows, got {count}: pass num_heads, "
            f"e.g. HoraConfig(num_heads={{{own!r}: 1}}), or leave it out of target_modules"
        )
    yield (
        role or identifier(own),
        Site(name, "weight", shape, Layout(pattern), ProjectionShape(count, rows // count, embed)),
    )


def _multihead_sites(name: str, module: nn.MultiheadAttention, config: HoraConfig) -> Iterator[tuple[str, Site]]:
    dim = module.embed_dim
    widths = {"q": dim, "k": module.kdim, "v": module.vdim}
    for index, (part, embed) in enumerate(widths.items()):
        if part not in config.fused_projections:
            continue
        projection = ProjectionShape(module.num_heads, dim // module.num_heads, embed)
        if module._qkv_same_embed_dim:
            layout = Layout("(h k) d", Window(0, index * dim, (index + 1) * dim))
            yield part, Site(name, "in_proj_weight", (3 * dim, dim), layout, projection)
        else:
            yield part, Site(name, f"{part}_proj_weight", (dim, embed), Layout(), projection)


def _layer_spec(name: str, found: list[tuple[str, Site]], config: HoraConfig) -> AdapterSpec:
    modules = dict.fromkeys(site.module for _, site in found)
    ranks = {module: _pattern(config.rank_pattern, module, config.r) for module in modules}
    alphas = {module: _pattern(config.alpha_pattern, module, config.hora_alpha) for module in modules}
    if len(set(ranks.values())) > 1 or len(set(alphas.values())) > 1:
        raise HoraError(
            f"the targets of one layer share rank and alpha, got {ranks} and {alphas} in {name!r}: let one pattern "
            "match all of them, e.g. 'layers.0.self_attn.(q|v)_proj'"
        )
    return config.spec(next(iter(ranks.values())), next(iter(alphas.values())))


def _unique(found: list[tuple[str, Site]]) -> dict[str, Site]:
    """Sites by projection name; modules that play the same role keep their own names."""
    roles = [role for role, _ in found]
    return {
        role if roles.count(role) == 1 else identifier(site.module.rpartition(".")[2]): site for role, site in found
    }


def _is_default(model: nn.Module, name: str, module: nn.Module, config: HoraConfig) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    parent_name, _, own = name.rpartition(".")
    if not _is_supported(module) or not (ROLE_OF.get(own) in ("q", "v") or own in FUSED):
        return False
    parent = base_module(model.get_submodule(parent_name))
    if own in FUSED and is_interleaved(parent, module, own):
        return False
    return Heads.find(model, parent, name, config).query is not None


def _is_supported(module: nn.Module) -> bool:
    if isinstance(module, (nn.MultiheadAttention, Conv1D)):
        return True
    return isinstance(module, nn.Linear) or (
        hasattr(module, "in_features") and hasattr(module, "out_features") and hasattr(module, "weight")
    )


def out_in(module: nn.Module) -> tuple[int, int]:
    """Output and input width of a supported module."""
    if isinstance(module, nn.MultiheadAttention):
        return 3 * module.embed_dim, module.embed_dim
    if isinstance(module, Conv1D):
        embed, rows = module.weight.shape
        return rows, embed
    return module.out_features, module.in_features


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if matches(key, module)), default)


def identifier(name: str) -> str:
    """A module name as the name of a projection."""
    name = re.sub(r"\W", "_", name)
    return f"_{name}" if name[:1].isdigit() else name
