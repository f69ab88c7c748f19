"""What would be adapted: layers, rows and heads of a model, decided before anything changes."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hora_spec import AdapterSpec, HoraError, LayerShape, Site, layer_from_json, layer_to_json, param_shapes
from peft import PeftModel
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from hora_torch.config import HoraConfig
from hora_torch.heads import DisagreeError, UnknownRowsError
from hora_torch.roles import ROLES, identifier, matches
from hora_torch.said import check_layers, check_patterns, unmatched
from hora_torch.sites import (
    Found,
    attention_of,
    check_recorded,
    find_sites,
    is_candidate,
    not_in_use,
    targets_of,
    where_named,
)
from hora_torch.targets import base_module, no_default, no_match, short_names


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The projections of one attention module, and the module that will own their hypernetwork.

    ``sources`` says for each projection of a new adapter how its rows and head count are known.
    """

    name: str
    spec: AdapterSpec
    sites: Mapping[str, Site]
    sources: Mapping[str, str]

    def __post_init__(self) -> None:
        param_shapes(self.spec, self.shape)  # refuses what does not fit together

    @property
    def leader(self) -> str:
        """Path of the first target in model order."""
        return next(iter(self.sites.values())).module

    @property
    def alone(self) -> bool:
        """Whether it is a map without heads, which shares nothing: such a layer is called as its module (spec S4)."""
        site = next(iter(self.sites.values()))
        return site.module == self.name and site.parameter == "weight"

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

    def describe(self) -> str:
        """One line per projection: weight, rows, heads and where they are known from."""
        lines = []
        for p, site in self.sites.items():
            rows = site.layout.rows(site.weight_shape)
            own = site.module.removeprefix(f"{self.name}.") if site.module != self.name else "(itself)"
            shape = site.projection
            lines.append(
                f"    {p}: {own}.{site.parameter} rows {rows}, {shape.num_heads} heads x "
                f"{shape.head_dim}, rank {self.spec.rank}; {self.sources.get(p, 'recorded in hora_layers')}"
            )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Plan:
    """What injecting a config into a model would adapt; print it.

    Parameters
    ----------
    layers
        In model order.
    left_out
        Path of each attention module, or of a part of it, that is not adapted by default, and why.
    unmatched
        Names in ``target_modules`` and ``modules_to_save`` that no module has, by field.
    target_modules
        Names that choose the adapted modules, in PEFT's meaning.
    """

    layers: tuple[LayerPlan, ...]
    left_out: Mapping[str, str]
    target_modules: Any = None
    unmatched: Mapping[str, list[str]] = field(default_factory=dict)

    def headline(self) -> str:
        """How many attention modules, and other maps, are adapted."""
        adapted = {layer.name for layer in self.layers if not layer.alone}
        partly, alone = adapted & self.left_out.keys(), len(self.layers) - len(adapted)
        text = f"HoRA adapts {len(adapted)} of {len(adapted | self.left_out.keys())} attention modules"
        text += f", {len(partly)} of them in part" if partly else ""
        return text + (f", and {alone} maps without heads" if alone else "")

    def warning(self) -> str:
        """What may not be as it was meant, in one line; empty if there is nothing."""
        left_out = [f"{self.headline()} (hora_torch.plan says which and why)"] if self.left_out else []
        return "; ".join([*left_out, *self._misspelt()])

    def _misspelt(self) -> list[str]:
        return [f"{name} names {names}, which no module is called" for name, names in self.unmatched.items()]

    def __str__(self) -> str:
        lines = [self.headline()]
        for names, text in _together((layer.name, layer.describe()) for layer in self.layers):
            lines += [f"  {names}", text]
        for names, why in _together((name, _anywhere(why, name)) for name, why in self.left_out.items()):
            lines += [f"  not {names}", f"    {why}"]
        return "\n".join([*lines, *(f"  {text}" for text in self._misspelt())])


def plan(model: nn.Module, config: HoraConfig) -> Plan:
    """What ``get_peft_model(model, config)`` would adapt, without changing anything.

    Parameters
    ----------
    model
        The base model, which may hold adapters already.
    config
        As for ``get_peft_model``; unchanged.

    Returns
    -------
    Plan
        Layers with their rows, heads and where each head count came from, and what is left out and why.

    Raises
    ------
    HoraError
        If a target is no linear map, the rows or heads of a named target are not known, sources disagree with each
        other or with `config`, targets of one layer differ in rank or alpha, or a loaded adapter was made for another
        model.

    Examples
    --------
    >>> import hora_torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> size = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(**size, num_hidden_layers=1))
    >>> plan = hora_torch.plan(model, hora_torch.HoraConfig(r=2))
    >>> plan.layers[0].sources["q"].split(", ")[:2]
    ['attention.config.num_attention_heads=2', 'attention.head_dim=4']
    >>> print(str(plan).splitlines()[0])
    HoRA adapts 1 of 1 attention modules
    """
    return make_plan(model.get_base_model() if isinstance(model, PeftModel) else model, config)


def make_plan(model: nn.Module, config: HoraConfig, leaders: Mapping[str, Any] | None = None) -> Plan:
    """As `plan`; the keys of a state dict, `leaders`, choose the targets instead of the config."""
    if config.target_modules == DUMMY_TARGET_MODULES:
        return Plan((), {}, config.target_modules)
    config = copy.copy(config)
    default = config.target_modules is None and leaders is None and config.given_layers is None
    if default:
        config.target_modules = short_names(model, [name for name, _ in _modules(model) if is_candidate(model, name)])
    elif config.target_modules is None and config.given_layers is not None:
        config.target_modules = {site["module"] for e in config.given_layers for site in e["projections"].values()}
    everything = _includes_everything(config, model)
    names = targets_of(model, leaders) if leaders is not None else _matching(model, config)
    if config.given_layers is not None:
        return Plan(_recorded(model, names, config), {}, config.target_modules)
    return _new_plan(model, names, config, named=not (default or everything))


def _includes_everything(config: HoraConfig, model: nn.Module) -> bool:
    """Replace ``"all-linear"`` by the names of all maps, as PEFT does, and of every ``nn.MultiheadAttention``."""
    said = config.target_modules
    _maybe_include_all_linear_layers(config, model)
    if config.target_modules is said:
        return False
    names = {name: base_module(module) for name, module in _modules(model)}
    whole = {name for name, module in names.items() if isinstance(module, nn.MultiheadAttention)}
    found = set(config.target_modules or ())
    config.target_modules = {name for name in found if name.rpartition(".")[0] not in whole} | whole
    return True


def planned_layer(config: HoraConfig, module: str) -> LayerPlan | None:
    """The layer that adapts the module at a path, as the config of an adapter describes it."""
    for entry in config.hora_layers or ():
        if any(site["module"] == module for site in entry["projections"].values()):
            return LayerPlan(*layer_from_json(entry), {})
    return None


def _new_plan(model: nn.Module, names: Iterable[str], config: HoraConfig, *, named: bool) -> Plan:
    """Layers of the targets; what is not known of one is an error where the user has `named` it."""
    names, left_out = list(names), {}
    check_patterns(config, ("num_heads", "row_order"), names)
    found: dict[str, list[Found]] = {}
    uncertain: set[str] = set()
    references = _references(model)
    for name in names:
        layer = _layer_name(model, name)
        if len(paths := references[model.get_submodule(name)]) > 1:
            raise HoraError(
                f"an adapted module stands in one place, {name!r} is one module with {paths}: adapting it would reach "
                "one of them; give each place a module of its own, or leave them out with exclude_modules"
            )
        try:
            if not named and (reason := not_in_use(model, name)):
                raise UnknownRowsError(reason)
            for place in find_sites(model, name, config):
                found.setdefault(name if place.alone else layer, []).append(place)
        except UnknownRowsError as error:
            if named:
                raise
            left_out.setdefault(layer, str(error))
            uncertain |= {layer} if isinstance(error, DisagreeError) else set()
    if not named:
        adapted = {place.site.module for places in found.values() for place in places}
        others = [name for name, _ in _modules(model) if name not in adapted]
        left_out |= {_layer_name(model, name): reason for name in others if (reason := where_named(model, name))}
    held = {place.role for places in found.values() for place in places} | set(ROLES)
    if found and (strange := [part for part in config.fused_projections if part not in held]):
        raise HoraError(f"fused_projections names parts of the targets, got {strange}, which none of them holds")
    layers = tuple(_layer_plan(name, sites, config) for name, sites in found.items() if sites and name not in uncertain)
    if not layers and not config.exclude_modules and not config.modules_to_save:
        raise no_match(model, config) if named else no_default(left_out)
    if layers:
        adapted = [module for layer in layers for module in layer.modules]
        check_patterns(config, ("rank_pattern", "alpha_pattern"), adapted)
        check_layers(config, adapted)
    unknown = unmatched(config, (name for name, _ in _modules(model)))
    if left_out:
        config.target_modules = short_names(model, [module for layer in layers for module in layer.modules])
    return Plan(layers, left_out, config.target_modules, unknown)


def _layer_plan(name: str, found: list[Found], config: HoraConfig) -> LayerPlan:
    named = _named(found)
    sites = {p: entry.site for p, entry in named.items()}
    return LayerPlan(name, _layer_spec(name, sites, config), sites, {p: entry.source for p, entry in named.items()})


def _recorded(model: nn.Module, names: Iterable[str], config: HoraConfig) -> tuple[LayerPlan, ...]:
    """The layers that a loaded adapter describes, checked against the model (spec F5)."""
    layers = tuple(LayerPlan(*layer_from_json(entry), {}) for entry in config.given_layers or ())
    recorded, names = {module for layer in layers for module in layer.modules}, set(names)
    if recorded != names:
        raise HoraError(
            f"a loaded adapter fits its own base model, missing here: {sorted(recorded - names)[:3]}, not in the "
            f"adapter: {sorted(names - recorded)[:3]}: load the base model it was trained on (spec F5), or for a new "
            "adapter set its hora_layers to None, or hora_layers in its file to null"
        )
    for layer in layers:
        for site in layer.sites.values():
            check_recorded(model, site)
        expected = _layer_spec(layer.name, layer.sites, config)
        if (layer.spec.replace(alpha=None), layer.spec.scaling) != (expected.replace(alpha=None), expected.scaling):
            raise HoraError(
                f"the config of a loaded adapter is not changed, {layer.name!r} was trained with {layer.spec}, got "
                f"{expected}: for a new adapter write a new HoraConfig"
            )
    return layers


def _layer_spec(name: str, sites: Mapping[str, Site], config: HoraConfig) -> AdapterSpec:
    modules = dict.fromkeys(site.module for site in sites.values())
    ranks = {module: _pattern(config.rank_pattern, module, config.r) for module in modules}
    alphas = {module: _pattern(config.alpha_pattern, module, config.hora_alpha) for module in modules}
    if len(set(ranks.values())) > 1 or len(set(alphas.values())) > 1:
        raise HoraError(
            f"the targets of one layer share rank and alpha, got {ranks} and {alphas} in {name!r}: let one pattern "
            "match all of them, e.g. 'layers.0.self_attn.(q|v)_proj'"
        )
    return config.spec(next(iter(ranks.values())), next(iter(alphas.values())))


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if matches(key, module)), default)


def _named(found: list[Found]) -> dict[str, Found]:
    """Sites by projection name; where a role occurs twice in a layer, the modules' names tell them apart."""
    roles = [entry.role for entry in found]
    parts = [entry.site.module for entry in found]
    named = {}
    for entry in found:
        name, module = entry.role, entry.site.module
        if roles.count(name) > 1:
            name = identifier(module.rpartition(".")[2])
            name = f"{name}_{entry.role}" if parts.count(module) > 1 else name
        named[name] = entry
    return named


def _layer_name(model: nn.Module, target: str) -> str:
    """A layer is named by its attention: what splits the projections into heads."""
    if isinstance(base_module(model.get_submodule(target)), nn.MultiheadAttention):
        return target
    return attention_of(model, target)[0] or "."


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Named modules of the model, without what is inside of adapters."""
    inside = tuple(f"{key}." for key, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return [(key, module) for key, module in model.named_modules() if key and not key.startswith(inside)]


def _references(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Module to all paths under which modules refer to it."""
    paths: dict[nn.Module, list[str]] = {}
    for path, owner in model.named_modules():
        for name, child in owner._modules.items():
            if child is not None:
                paths.setdefault(child, []).append(f"{path}.{name}" if path else name)
    return paths


def _matching(model: nn.Module, config: HoraConfig) -> list[str]:
    return [name for name, _ in _modules(model) if check_target_module_exists(config, name)]


def _anywhere(text: str, name: str) -> str:
    """A text without the path of the module that it is about, which it quotes."""
    return re.sub(rf"'{re.escape(name)}(?=[.'])", "'...", text)


def _together(entries: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Entries of equal text as one, under the name of the first and the number of the others."""
    groups: dict[str, list[str]] = {}
    for name, text in entries:
        groups.setdefault(text, []).append(name)
    return [
        (names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more", text)
        for text, names in groups.items()
    ]
