"""From names to shapes: which modules of a model are adapted, in which layer, with how many heads.

Every name that another library gives to attention is translated here and nowhere else.
"""

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
from torch import nn
from transformers.pytorch_utils import Conv1D

from hora_torch.config import HoraConfig

ROLES = {
    "q": ("q_proj", "query", "q", "q_lin", "to_q", "wq", "query_proj", "q_attn", "linear_q"),
    "k": ("k_proj", "key", "k", "k_lin", "to_k", "wk", "key_proj", "linear_k"),
    "v": ("v_proj", "value", "v", "v_lin", "to_v", "wv", "value_proj", "linear_v"),
}
"""Names of separate projections in transformers, timm and common code."""

FUSED = ("qkv", "qkv_proj", "c_attn", "Wqkv", "to_qkv")
"""Names of one Linear or Conv1D whose output is q, then k, then v, each ``[head][head_dim]``."""

_INTERLEAVED = ("CodeGenAttention",)
"""Attention classes with such a name for another order, beside timm's ``head_first`` and GPT-BigCode's many heads."""

_NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_NUM_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "kv_heads")
_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim", "d_kv", "head_size")
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}


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
    heads = _Heads.find(model, parent, name, config)
    if own in FUSED and heads.query:
        if _is_interleaved(parent, module, own):
            raise HoraError(
                f"a fused weight is adapted when its rows are all of q, then k, then v, got another order in {name!r} "
                f"of {type(parent).__name__}: leave it out of target_modules"
            )
        for part, start, width, count in heads.split(name, own, rows, getattr(parent, "is_cross_attention", False)):
            if part in config.fused_projections:
                projection = ProjectionShape(count, width // count, embed)
                yield part, Site(name, "weight", shape, Layout(pattern, Window(axis, start, start + width)), projection)
        return
    role = _ROLE_OF.get(own)
    count = heads.of(role)
    if not count or rows % count:
        raise HoraError(
            f"the head count of {name!r} must be known and divide its {rows} output rows, got {count}: pass num_heads, "
            f"e.g. HoraConfig(num_heads={{{own!r}: 1}}), or leave it out of target_modules"
        )
    yield (
        role or _identifier(own),
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


@dataclass(frozen=True, slots=True)
class _Heads:
    """Head counts of one attention module."""

    query: int | None
    key_value: int | None
    head_dim: int | None
    explicit: bool

    @classmethod
    def find(cls, model: nn.Module, attention: nn.Module, name: str, config: HoraConfig) -> "_Heads":
        """From the config of the adapter, else the attention module, its config, or the model's."""
        own_role = _ROLE_OF.get(name.rpartition(".")[2]) or name.rpartition(".")[2] in FUSED
        sources: list[Any] = [attention, getattr(attention, "config", None)]
        if own_role:
            sources.append(getattr(model, "config", None))
        query = _first(sources, _NUM_HEADS) if own_role else None
        key_value = _first(sources, _NUM_KV_HEADS) or query
        explicit = config.num_heads
        if isinstance(explicit, Mapping):
            explicit = next((count for key, count in explicit.items() if _matches(key, name)), None)
        if explicit is not None:
            query, key_value = explicit, config.num_kv_heads or explicit
        return cls(query, config.num_kv_heads or key_value, _first(sources[:2], _HEAD_DIM), explicit is not None)

    def of(self, role: str | None) -> int | None:
        return self.key_value if role in ("k", "v") else self.query

    def split(self, name: str, own: str, rows: int, cross: bool) -> list[tuple[str, int, int, int]]:
        """Name, start, width and head count of each part of a fused projection of `rows` rows."""
        parts = {"q": self.query, "k": self.key_value, "v": self.key_value}
        if own == "c_attn" and cross:  # GPT-2: the query has a projection of its own
            del parts["q"]
        total = sum(parts.values())
        head_dim, rest = divmod(rows, total)
        if rest or (self.head_dim and self.head_dim != head_dim):
            raise HoraError(
                f"{name!r} has {rows} output rows, which are not {parts} heads of width {self.head_dim or head_dim} in "
                "the order q, k, v: pass num_heads and num_kv_heads, or leave it out of target_modules"
            )
        starts, start = [], 0
        for part, count in parts.items():
            starts.append((part, start, count * head_dim, count))
            start += count * head_dim
        return starts


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
        role if roles.count(role) == 1 else _identifier(site.module.rpartition(".")[2]): site for role, site in found
    }


def _is_default(model: nn.Module, name: str, module: nn.Module, config: HoraConfig) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    parent_name, _, own = name.rpartition(".")
    if not _is_supported(module) or not (_ROLE_OF.get(own) in ("q", "v") or own in FUSED):
        return False
    parent = base_module(model.get_submodule(parent_name))
    if own in FUSED and _is_interleaved(parent, module, own):
        return False
    return _Heads.find(model, parent, name, config).query is not None


def _is_interleaved(attention: nn.Module, module: nn.Module, own: str) -> bool:
    if own == "c_attn" and not isinstance(module, Conv1D):
        return not getattr(attention, "multi_query", False)
    return bool(getattr(attention, "head_first", False)) or type(attention).__name__ in _INTERLEAVED


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


def _first(sources: Iterable[Any], names: tuple[str, ...]) -> int | None:
    for source in sources:
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if _matches(key, module)), default)


def _matches(key: str, module: str) -> bool:
    """PEFT's rule for patterns: the end of the path, as a regular expression."""
    return re.match(rf"(.*\.)?({key})$", module) is not None


def _identifier(name: str) -> str:
    name = re.sub(r"\W", "_", name)
    return f"_{name}" if name[:1].isdigit() else name
