"""From a target module to the places of its projections, and whether adapting it would act."""

import ast
import contextlib
import functools
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from hora_spec import HoraError, Layout, ProjectionShape, Site, Window
from torch import Tensor, nn

from hora_torch.config import HoraConfig
from hora_torch.heads import Attention, Rows, UnknownRowsError
from hora_torch.roles import FUSED, ROLE_OF, identifier, kind
from hora_torch.row_order import is_where_named, row_order
from hora_torch.sharding import check_rows_alone, is_sharded
from hora_torch.targets import CONVOLUTIONS, base_module, is_supported, out_in, stored_form

_MULTIHEAD_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_SHARED = {"qk", "kv"}  # one projection that is both
_OF_MULTIHEAD = "the shape of nn.MultiheadAttention"


class Found(NamedTuple):
    """A projection that a target holds, how its rows and heads are known, and whether it shares nothing (spec S4)."""

    role: str
    site: Site
    source: str
    alone: bool = False


def find_sites(model: nn.Module, name: str, config: HoraConfig) -> Iterator[Found]:
    """Places of the projections that the target `name` holds and `config` adapts.

    Raises
    ------
    HoraError
        If the module cannot be adapted, or what is known of its rows and heads is not enough or contradictory.
    """
    module = base_module(model.get_submodule(name))
    if isinstance(module, nn.MultiheadAttention):
        yield from _of_multihead(name, module, config)
        return
    parent_name, _, own = name.rpartition(".")
    parent = base_module(model.get_submodule(parent_name))
    if not is_supported(module) or isinstance(parent, nn.MultiheadAttention):
        raise HoraError(
            "targets are Linear, Conv1D and MultiheadAttention modules, and convolutions with a kernel of one, got "
            f"{type(module).__name__} at {name!r}"
            + (": its forward is never called, target the MultiheadAttention" if is_supported(module) else "")
            + (
                ": layouts have no axis for a wider kernel, and none for padding (spec L1)"
                if isinstance(module, CONVOLUTIONS)
                else ""
            )
        )
    if _is_bypassed(parent, own):
        raise UnknownRowsError(
            f"an adapted module is called by its attention, {type(parent).__name__} reads {own}.weight past it, so "
            f"that nothing would be trained: leave {name!r} out of target_modules"
        )
    owner, own = attention_of(model, name)
    rows = _attention(model, owner, own, config).rows(own)
    wanted = config.fused_projections
    chosen = [part for part in rows if part.role in wanted or kind(part.role) in wanted]
    if len(rows) == 1:
        chosen = rows
    elif own in ROLE_OF:  # beside a gate, or twice
        chosen = [part for part in rows if kind(part.role) == ROLE_OF[own]]
    if not chosen:
        raise UnknownRowsError(
            f"a fused weight holds one of fused_projections, {config.fused_projections}, got {name!r} with "
            f"{[part.role for part in rows]}: name some of these"
        )
    for part in chosen:
        yield Found(part.role, _site(name, module, part), part.source, part.alone)


def attention_of(model: nn.Module, name: str) -> tuple[str, str]:
    """Path of the attention that splits the output of a module, and the module's path in it.

    The parent, unless the class of a module further out is known to do so.
    """
    path = name
    while path:
        path = path.rpartition(".")[0]
        inner = name.removeprefix(f"{path}.")
        if row_order(base_module(model.get_submodule(path)), inner) is not None:
            return path, inner
    owner, _, own = name.rpartition(".")
    return owner, own


def is_candidate(model: nn.Module, name: str) -> bool:
    """Whether a module looks like one that is adapted by default: an attention, a query, a value, or both fused."""
    module = base_module(model.get_submodule(name))
    if isinstance(module, nn.MultiheadAttention):
        return True
    parent_name, _, own = name.rpartition(".")
    parent = base_module(model.get_submodule(parent_name))
    if not is_supported(module) or isinstance(parent, nn.MultiheadAttention):
        return False
    owner, inner = attention_of(model, name)
    attention = base_module(model.get_submodule(owner))
    order = row_order(attention, inner)
    if order is not None:
        return bool({"q", "v"} & set(map(kind, order.names))) and not is_where_named(attention)
    return not isinstance(module, CONVOLUTIONS) and (ROLE_OF.get(own) in ("q", "v") or own in FUSED)


def where_named(model: nn.Module, name: str) -> str | None:
    """Why a module is adapted where it is named alone, if that is so: its heads are not those of queries or values."""
    owner, own = attention_of(model, name)
    attention = base_module(model.get_submodule(owner))
    order = row_order(attention, own)
    if order is None or not (is_where_named(attention) or order.is_one_map or _SHARED & set(order.names)):
        return None
    what = f"{own!r} of {type(attention).__name__}"
    if not is_where_named(attention):
        holds = "rows of no head" if order.is_one_map else "keys that are queries or values, too"
        return f"what is neither q nor v is adapted where it is named, {what} holds {holds}: add it to target_modules"
    parts = ", ".join(part for part in order.names if part not in ("z", "dt"))
    return (
        f"heads of linear attention and state spaces are adapted where they are named, {what} holds {parts}: add it to "
        "target_modules, and what is wanted to fused_projections"
    )


def targets_of(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Modules that a state dict adapts: its leaders, and what in their attention plays a role they generate for."""
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
        owner, _ = attention_of(model, leader)
        attention = base_module(model.get_submodule(owner))
        for own, module in attention.named_modules():
            name = f"{owner}.{own}".lstrip(".")
            if own and is_supported(base_module(module)) and attention_of(model, name) == (owner, own):
                chosen |= {name} if roles & _names(attention, own) else set()
    return [name for name, _ in model.named_modules() if name in chosen]


def _names(attention: nn.Module, own: str) -> set[str]:
    """Names that the projections of a module may have in a layer."""
    order, child = row_order(attention, own), identifier(own.rpartition(".")[2])
    parts = set(order.names) if order is not None else {ROLE_OF[own]} if own in ROLE_OF else set()
    return {child, *parts, *(f"{child}_{part}" for part in parts)}


def not_in_use(model: nn.Module, name: str) -> str | None:
    """Why a default target may be idle: its attention holds both fused and separate projections."""
    parent_name, _, own = name.rpartition(".")
    parent = base_module(model.get_submodule(parent_name))
    children = [child for child, module in parent.named_children() if is_supported(base_module(module))]
    rivals = {child for child in children if (child in ROLE_OF) != (own in ROLE_OF)}
    rivals = {child for child in rivals if _roles(parent, child) & _roles(parent, own)}
    if not rivals:
        return None
    uses_fused = getattr(parent, "fused_projections", None)  # of diffusers
    if uses_fused is None or uses_fused != (own not in ROLE_OF):
        return (
            f"{type(parent).__name__} at {parent_name!r} has {sorted({own} | rivals)}, of which it uses some: name the "
            "right ones in target_modules"
        )
    return None


def _roles(attention: nn.Module, own: str) -> set[str]:
    """What a child is by its name, or its rows by the class of the attention."""
    if own in ROLE_OF:
        return {ROLE_OF[own]}
    order = row_order(attention, own) if own in FUSED else None
    return set(order.names) if order is not None else set()


def check_recorded(model: nn.Module, site: Site) -> None:
    """Raise unless the model holds the weight that a loaded adapter was trained on (spec F5)."""
    module = base_module(model.get_submodule(site.module))
    inside = isinstance(module, nn.MultiheadAttention)
    # codes have no weight of that name, and stand for one
    weight = getattr(module, site.parameter, None) if inside and site.parameter in _MULTIHEAD_WEIGHTS else None
    if weight is None and (inside or site.parameter != "weight" or not is_supported(module)):
        raise HoraError(
            f"the adapter has {site.parameter!r} of {site.module!r}, which {type(module).__name__} lacks: load the "
            "base model the adapter was trained on (spec F5)"
        )
    shape, pattern = (tuple(weight.shape), Layout().pattern) if weight is not None else stored_form(module)
    axis = Layout(pattern).row_axis
    axes = {site.layout.row_axis, site.layout.row_axis if site.layout.window is None else site.layout.window.axis}
    if shape != site.weight_shape or axes != {axis}:
        raise HoraError(
            f"{site.module}.{site.parameter} must have shape {site.weight_shape} and rows as in {site.layout}, got "
            f"{tuple(shape)} and rows along axis {axis}: load the base model the adapter was trained on "
            "(spec F5)"
        )


def _attention(model: nn.Module, path: str, own: str, config: HoraConfig) -> Attention:
    module = base_module(model.get_submodule(path))
    widths = {
        child: out_in(base)[0]
        for child, part in module.named_children()
        if is_supported(base := base_module(part)) and not isinstance(base, nn.MultiheadAttention)
    }
    widths[own] = out_in(base_module(module.get_submodule(own)))[0]
    return Attention(module, path, widths, getattr(model, "config", None), config)


def _site(name: str, module: nn.Module, rows: Rows) -> Site:
    shape, pattern = stored_form(module)
    axis, (width, embed) = Layout(pattern).row_axis, out_in(module)
    weight = module._parameters.get("weight")
    if weight is not None and is_sharded(weight):
        if isinstance(module, CONVOLUTIONS):
            raise HoraError(f"an adapted convolution is whole, the weight of {name!r} is sharded: leave it out")
        check_rows_alone(weight, axis, name)
    window = None
    if rows.heads * rows.head_dim < width:
        window = Window(axis, rows.start, rows.stop, rows.blocks)
    projection = ProjectionShape(rows.heads, rows.head_dim, embed)
    return Site(name, "weight", shape, Layout(pattern, window), projection)


def _of_multihead(name: str, module: nn.MultiheadAttention, config: HoraConfig) -> Iterator[Found]:
    dim = module.embed_dim
    widths = {"q": dim, "k": module.kdim, "v": module.vdim}
    for index, (part, embed) in enumerate(widths.items()):
        if part not in config.fused_projections:
            continue
        projection = ProjectionShape(module.num_heads, dim // module.num_heads, embed)
        if module._qkv_same_embed_dim:
            layout = Layout("(h k) d", Window(0, index * dim, (index + 1) * dim))
            site = Site(name, "in_proj_weight", (3 * dim, dim), layout, projection)
        else:
            site = Site(name, f"{part}_proj_weight", (dim, embed), Layout(), projection)
        yield Found(part, site, _OF_MULTIHEAD)


def _is_bypassed(attention: nn.Module, own: str) -> bool:
    """Whether the code of an attention computes with the weight of a child instead of calling it.

    timm's BEiT, EVA and Swin v2 do so unless told otherwise (``qkv_bias_separate``), which `HoraModel` does.
    """
    return not hasattr(attention, "qkv_bias_separate") and _reads_weight(type(attention), own)


@functools.cache
def _reads_weight(cls: type, own: str) -> bool:
    """Whether code of the class mentions the weight of its child and never calls the child."""
    read = called = False
    for node in itertools.chain.from_iterable(map(ast.walk, _trees(cls))):
        if isinstance(node, ast.Call) and _is_own(node.func, own):
            called = True
        elif isinstance(node, ast.Attribute) and node.attr == "weight" and _is_own(node.value, own):
            read = True
    return read and not called


def _is_own(node: ast.AST, own: str) -> bool:
    """Whether an expression is ``self.<own>``."""
    return (
        isinstance(node, ast.Attribute)
        and node.attr == own
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _trees(cls: type) -> Iterator[ast.AST]:
    """Code of the methods of a class that may compute, not those that set or rearrange its weights.

    Of a method that a subclass replaces, only what its new code may call.
    """
    replaced: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, method in vars(base).items():
            if inspect.isfunction(method) and name not in replaced and not re.search("init|reset|fuse", name):
                with contextlib.suppress(OSError, TypeError, SyntaxError):
                    source = textwrap.dedent(inspect.getsource(method))
                    yield ast.parse(source)
                    replaced |= {name} if "super()" not in source else set()
