"""Which output rows of a module belong to which heads, and how that is known.

The names that other libraries give to head counts and widths are translated here, those of projections in `roles`, the
orders of fused rows in `row_order`, nowhere else. A name proves nothing: whatever knows a count or a width is asked,
what they say is compared with the rows, and sources that disagree are an error that shows them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from math import prod
from numbers import Integral
from typing import Any, NamedTuple

from hora_spec import HoraError
from torch import nn

from hora_torch.config import HoraConfig
from hora_torch.order import Order
from hora_torch.roles import FUSED, ROLE_OF, ROLES, identifier, matches
from hora_torch.row_order import row_order

_COUNT_NAMES = {
    "q": ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads"),
    "kv": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "kv_heads"),
}
_WIDTH_NAMES = ("head_dim", "attention_head_size", "key_value_proj_dim", "d_kv", "head_size", "dim_head", "dim_heads")
_OWN_NAMES = {  # count and width of one role alone, in linear and latent attention; they go before the others
    "q": ("num_k_heads", "qk_head_dim", "head_k_dim"),
    "k": ("num_k_heads", "qk_head_dim", "head_k_dim"),
    "v": ("num_v_heads", "v_head_dim", "head_v_dim"),
}
_USER, _ATTENTION, _MODEL = 0, 1, 3  # levels of sources; 2 is the attention's config, the model's alone proves nothing


class UnknownRowsError(HoraError):
    """Nothing says, or sources disagree on, which rows of a module belong to which head."""


class DisagreeError(UnknownRowsError):
    """Sources disagree, so that nothing about the attention is certain."""


class Rows(NamedTuple):
    """Rows ``start:stop`` of each of `blocks` equal parts of a module's rows, split evenly into heads.

    `source` says how that is known. ``alone`` where there are no heads to share anything over, so that the rows are a
    layer of their own (spec S4).
    """

    role: str
    heads: int
    head_dim: int
    start: int
    stop: int
    blocks: int
    source: str
    alone: bool = False


class _Fact(NamedTuple):
    """A number, and who says it: the lower the level, the closer to the attention."""

    value: int
    source: str
    level: int

    def __str__(self) -> str:
        return f"{self.source}={self.value}"


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention module and what knows its heads.

    Parameters
    ----------
    module
        The module that owns the projections.
    path
        Where it is in the model; empty for the model itself.
    widths
        Output rows of each child that is a linear map.
    model_config
        The model's config, asked for a module that has none of its own.
    config
        What the user says.
    """

    module: nn.Module
    path: str
    widths: Mapping[str, int]
    model_config: Any
    config: HoraConfig

    def order(self, own: str) -> Order | None:
        """Order in which the rows of the child `own` belong to projections; None for one that is called q, k or v.

        Raises
        ------
        UnknownRowsError
            If the child is called as if it held several projections and nothing says how.
        """
        path, kind = self._child(own), type(self.module).__name__
        said = next((order for key, order in (self.config.row_order or {}).items() if matches(key, path)), None)
        known = row_order(self.module, own)
        if said and known and said != str(known):
            raise HoraError(
                f"a row_order is for classes that are not known, got {said!r} for {path!r} of {kind}, whose rows come "
                f"as {known}: leave it out of row_order"
            )
        if said is None and known is None and own in FUSED and own not in ROLE_OF:
            raise UnknownRowsError(
                f"the order of fused rows is known per attention class, {kind} is not known and the name {path!r} "
                f'proves nothing: pass HoraConfig(row_order={{"{own}": "q k v"}}) if it is all of q, then k, then v, '
                f'"[head][q k v]" if each head has its own q, k and v, "{identifier(own)}:1" if it is to be one map, '
                "or leave it out of target_modules"
            )
        return Order.parse(said) if said else known

    def rows(self, own: str) -> list[Rows]:
        """The parts that the child `own` holds.

        Raises
        ------
        HoraError
            If what the user says contradicts the model.
        UnknownRowsError
            If the order of the rows or the head counts are not known, or sources disagree.
        """
        order = self.order(own)
        if order is not None:
            return self._told(own, order) if order.sized else self._fused(own, order)
        role, width = ROLE_OF.get(own), self.widths[own]
        if role is None and not self._counts(own, None):
            return [Rows(identifier(own), 1, width, 0, width, 1, "a map without heads has one", alone=True)]
        heads, source = self._separate(own, role, width)
        source += "" if role else ": blocks of output rows, which are heads of no attention"
        return [Rows(role or identifier(own), heads, width // heads, 0, width, 1, source)]

    def _told(self, own: str, order: Order) -> list[Rows]:
        """Parts whose heads and widths the order tells, which make up all rows."""
        rows, sizes = self.widths[own], []
        for part in order.parts:
            heads, *factors = [self._number(own, factor) for factor in part.factors]
            together = rows if part.rows is None else self._number(own, part.rows)
            sizes.append((heads, prod(factors) if factors else together // heads))
        blocks = 1 if order.blocks is None else self._number(own, order.blocks)
        self._check_said(own, order, sizes)
        names = [name for part in order.parts for name in part.numbers if not name.isdigit()]
        source = ", ".join(dict.fromkeys(str(self._attribute(own, name)) for name in names)) or f"row_order {order}"
        return self._placed(own, order, sizes, blocks, source)

    def _check_said(self, own: str, order: Order, sizes: Sequence[tuple[int, int]]) -> None:
        """Raise if the user, or the attention itself, says another number of heads than the order.

        Also its config, where the order calls all rows of what is called a query, key or value by another name.
        """
        for part, (heads, _) in zip(order.parts, sizes, strict=True):
            lone = ROLE_OF.get(own) if len(order.parts) == 1 else None
            role = part.name if part.name in ROLES else lone
            last = (_MODEL - 1 if lone else _ATTENTION) if self._is_said(own) else _USER
            said = [fact for fact in self._counts(own, role) if fact.level <= last] if role else []
            if said and all(fact.value != heads for fact in said):
                raise HoraError(
                    f"the heads of {part.name} in {self._child(own)!r} are one number, got {heads} from the order "
                    f"{order} and {', '.join(map(str, said))}: correct one of them"
                )

    def _number(self, own: str, factor: str) -> int:
        return int(factor) if factor.isdigit() else self._attribute(own, factor).value

    def _attribute(self, own: str, name: str) -> _Fact:
        found = [fact for fact in self._ask((name,)) if fact.level < _MODEL]
        if not found:
            raise UnknownRowsError(
                f"an order of rows names attributes of the attention module or its config that are integers above 0, "
                f"got {name!r} for {self._child(own)!r} of {type(self.module).__name__}: name others, or write numbers"
            )
        return found[0]

    def _placed(self, own: str, order: Order, sizes: Sequence[tuple[int, int]], blocks: int, source: str) -> list[Rows]:
        """Parts one after the other in each block, which holds an equal share of the heads of each."""
        rows, total = self.widths[own], sum(heads * width for heads, width in sizes)
        if total != rows or any(heads % blocks for heads, _ in sizes):
            named = zip(order.names, sizes, strict=True)
            parts = ", ".join(f"{heads} heads x {width} of {p}" for p, (heads, width) in named)
            raise UnknownRowsError(
                f"the parts of {self._child(own)!r} make up its {rows} output rows, in blocks of whole heads, got "
                f"{parts} in {blocks} blocks ({source}): pass another row_order, or leave it out of target_modules"
            )
        start, result = 0, []
        for name, (heads, width) in zip(order.names, sizes, strict=True):
            stop = start + heads // blocks * width
            result.append(Rows(name, heads, width, start, stop, blocks, source, order.is_one_map))
            start = stop
        return result

    def _separate(self, own: str, role: str | None, rows: int) -> tuple[int, str]:
        """Heads of a projection with a weight of its own."""
        said: dict[_Fact, int | None] = {fact: fact.value for fact in self._counts(own, role)}
        for fact in self._widths(role):
            said[fact] = _quotient(rows, fact.value)
        if role in ("k", "v"):
            said |= dict(self._from_siblings(role, rows, alone=not said))
        candidates: dict[int, list[_Fact]] = {}
        for fact, heads in said.items():
            if heads and _quotient(rows, heads):
                candidates.setdefault(heads, []).append(fact)
        heads, facts = self._choose(own, f"{rows} output rows", candidates, list(said))
        return heads, ", ".join(map(str, facts))

    def _sibling(self, role: str) -> tuple[str, Rows] | None:
        """The projection beside this one that plays `role`, if its heads are known."""
        name = next((child for child in self.widths if ROLE_OF.get(child) == role), None)
        try:
            return None if name is None else (name, self.rows(name)[0])
        except UnknownRowsError:
            return None

    def _from_siblings(self, role: str, rows: int, *, alone: bool) -> Iterator[tuple[_Fact, int | None]]:
        """What the query says about a key or value: the groups, for want of a width its own, or `alone` its count.

        Values have as many heads as keys.
        """
        if role == "v" and (keys := self._sibling("k")):
            yield _Fact(keys[1].heads, f"the heads of {keys[0]}", _ATTENTION), keys[1].heads
            alone = False
        if not (found := self._sibling("q")):
            return
        name, query = found
        for fact in self._ask(("num_key_value_groups",)):
            yield fact, _quotient(query.heads, fact.value)
            alone = False
        for fact in self._counts(name, "q") if alone else ():
            yield fact, fact.value
        if not self._widths(role):
            width = query.head_dim
            yield _Fact(width, f"the width of a head of {name}", _ATTENTION), _quotient(rows, width)

    def _fused(self, own: str, order: Order) -> list[Rows]:
        """Parts q, k and v of one width, whose heads the model tells.

        Where nothing counts keys and values there are as many as queries. Of an order that a user tells, a width must
        confirm that: queries may be grouped.
        """
        rows, widths = self.widths[own], self._widths("q")
        others = "kv" if self._counts(own, "kv") else "q"
        roles = ["q" if part == "q" else others for part in order.names]
        known = {role: self._counts(own, role) for role in dict.fromkeys(roles)}
        grouped = others == "q" and set(order.names) != {"q"} and order.blocks != "head" and self._is_said(own)
        candidates: dict[tuple[int, ...], list[_Fact]] = {}
        for counts in product(*({fact.value for fact in facts} for facts in known.values())):
            number = dict(zip(known, counts, strict=True))
            width = _quotient(rows, sum(number[role] for role in roles))
            confirmed = [fact for fact in widths if fact.value == width]
            if width and (confirmed or not grouped):
                agree = [fact for role, facts in known.items() for fact in facts if fact.value == number[role]]
                candidates[counts] = agree + confirmed
        what = f"{rows} output rows in the order {order}"
        counts, facts = self._choose(own, what, candidates, [*chain.from_iterable(known.values()), *widths])
        number = dict(zip(known, counts, strict=True))
        heads = [number[role] for role in roles]
        named = {None: 1, "head": max(heads), "group": min(heads)}
        blocks = named[order.blocks] if order.blocks in named else self._number(own, str(order.blocks))
        sizes = [(count, rows // sum(heads)) for count in heads]
        return self._placed(own, order, sizes, blocks, ", ".join(map(str, facts)))

    def _choose(
        self, own: str, what: str, candidates: Mapping[Any, list[_Fact]], facts: Sequence[_Fact]
    ) -> tuple[Any, list[_Fact]]:
        """The candidate that most sources confirm; the user and the attention itself must be among those that do."""
        ranked = sorted(candidates.items(), key=lambda item: -len(item[1]))
        close = [fact for fact in facts if fact.level <= _ATTENTION]
        tied = len(ranked) > 1 and len(ranked[0][1]) == len(ranked[1][1])
        certain = ranked and not tied and all(fact in ranked[0][1] for fact in close)
        if certain and any(fact.level < _MODEL for fact in ranked[0][1]):
            return ranked[0]
        known = ", ".join(map(str, facts)) or "nothing"
        kind = DisagreeError if len(facts) > 1 else UnknownRowsError
        raise (HoraError if any(fact.level == _USER for fact in facts) else kind)(
            f"the head count of {self._child(own)!r} must be known and divide its {what}, and all sources agree, got "
            f'{known}: pass num_heads and num_kv_heads, e.g. HoraConfig(num_heads={{"{own}": 1}}), or leave it out of '
            "target_modules"
        )

    def _counts(self, own: str, role: str | None) -> list[_Fact]:
        """Head counts of a role from every source."""
        said = self.config.num_heads
        whole = not isinstance(said, Mapping)  # one number is that of all queries
        if isinstance(said, Mapping):
            said = next((count for key, count in said.items() if matches(key, self._child(own))), None)
        users = [(said, "num_heads")] if role in ("q", None) or (role != "kv" and not whole) else []
        users += [(self.config.num_kv_heads, "num_kv_heads")] if role not in ("q", None) else []
        found = [_Fact(value, f"HoraConfig.{name}", _USER) for value, name in users if value is not None]
        if role is None:
            return found
        return found + (
            self._ask(_OWN_NAMES.get(role, ())[:1]) or self._ask(_COUNT_NAMES["q" if role == "q" else "kv"])
        )

    def _widths(self, role: str | None) -> list[_Fact]:
        return [] if role is None else self._ask(_OWN_NAMES[role][1:]) or self._ask(_WIDTH_NAMES)

    def _ask(self, names: Sequence[str]) -> list[_Fact]:
        """What the attention module, its config, or else the model's, call by one of `names`."""
        own = getattr(self.module, "config", None)
        far = ("model.config", self.model_config, _MODEL) if own is None else ("attention.config", own, 2)
        facts = []
        for source, holder, level in (("attention", self.module, _ATTENTION), far):
            for name in names:
                value = _attribute(holder, name)
                if isinstance(value, Integral) and not isinstance(value, bool) and value > 0:
                    facts.append(_Fact(int(value), f"{source}.{name}", level))
        return facts

    def _is_said(self, own: str) -> bool:
        """Whether the order of the rows of a fused child is known from the user alone."""
        return row_order(self.module, own) is None

    def _child(self, own: str) -> str:
        return f"{self.path}.{own}" if self.path else own


def _attribute(holder: Any, name: str) -> Any:
    """What `holder` calls `name`, if it says: a config of transformers 5.23 raises where its layers differ."""
    name, _, index = name.partition(".")
    try:
        value = getattr(holder, name, None)
    except RuntimeError:
        return None
    if not index:
        return value
    return value[int(index)] if isinstance(value, (list, tuple)) and int(index) < len(value) else None


def _quotient(number: int, divisor: int) -> int | None:
    return None if divisor < 1 or number % divisor else number // divisor
