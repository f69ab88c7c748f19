"""Orders of output rows as text, such as ``"[head][q k v]"``: what the rows of one weight are, one after the other."""

import re
from dataclasses import dataclass

from hora_spec import HoraError

from hora_torch.roles import ROLES

_NUMBER = r"(?!0)\w+(?:\.\d+)?"
_PART = re.compile(rf"([A-Za-z_]\w*)(?::({_NUMBER}(?:\*{_NUMBER})*)(?:/({_NUMBER}))?)?", re.ASCII)
_ORDER = re.compile(r"(?:\[((?!0)\w+)\]\s*\[([^\[\]]+)\]|([^\[\]]+))", re.ASCII)


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one projection, or of something else: how many heads, and factors of the width of one, or all rows.

    Factors are numbers in digits, or names of attributes of the attention module or its config; none where the model is
    asked, one, the heads, where the weight holds nothing else.
    """

    name: str
    factors: tuple[str, ...] = ()
    rows: str | None = None

    @property
    def numbers(self) -> tuple[str, ...]:
        """All numbers and attributes that it is told with."""
        return self.factors if self.rows is None else (*self.factors, self.rows)


@dataclass(frozen=True, slots=True)
class Order:
    """The parts of the output rows of one weight.

    Parameters
    ----------
    text
        ``"q k v"``: all rows of q, then of k, then of v, each head by head. ``"[N][q k v]"``: N blocks that follow each
        other, in each the N-th part of the heads of q, then of k, then of v. N is a number, the name of an attribute,
        ``head`` for as many as there are heads, ``group`` for as many as there are keys. ``name:heads*width`` says how
        many heads a part has and how wide one is, ``name:heads/rows`` how many rows they have together, in numbers or
        names of attributes (``sizes.0`` is the first of several); q, k and v of one width may be called by their names
        alone. A second map of the same kind has a number behind its name, ``q2``. Rows that are not split into heads
        are ``name:1``.

    Raises
    ------
    HoraError
        If the text is none of these.

    Examples
    --------
    >>> Order.parse("[num_heads][k:num_heads*96 v:num_heads*v_head_dim]").names
    ('k', 'v')
    """

    text: str
    blocks: str | None
    parts: tuple[Part, ...]

    @classmethod
    def parse(cls, text: str) -> "Order":
        """The order that a text describes."""
        whole = _ORDER.fullmatch(text.strip()) if isinstance(text, str) else None
        found = [_PART.fullmatch(part) for part in (whole[2] or whole[3]).split()] if whole else []
        parts = tuple(Part(part[1], tuple(part[2].split("*")) if part[2] else (), part[3]) for part in found if part)
        names = [part.name for part in parts]
        plain = all(part.name in ("q", "k", "v") and not part.factors for part in parts)
        sized = all(len(part.numbers) > 1 for part in parts) or (len(parts) == 1 and bool(parts[0].factors))
        twice = any(part.rows and len(part.factors) > 1 for part in parts)
        if None in found or not parts or len(set(names)) < len(names) or twice or not (plain or sized):
            raise HoraError(
                "an order of rows names its parts, as in 'q k v', '[head][q k v]', '[group][q k v]' for grouped "
                "queries, '[4][q v k]', or with heads and width of each, numbers or attributes of the attention, as in "
                f"'[num_heads][q:num_heads*64 gate:num_heads*64]', got {text!r}"
            )
        return cls(text, whole[1] if whole else None, parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts."""
        return tuple(part.name for part in self.parts)

    @property
    def is_one_map(self) -> bool:
        """Whether the rows are not split into heads, so that all of them are one (spec S3), as in ``"points:1"``."""
        first = self.parts[0]  # the only one, where it has one number
        return first.numbers == ("1",) and first.name not in ROLES

    @property
    def sized(self) -> bool:
        """Whether heads are told part by part."""
        return bool(self.parts[0].factors)

    def __str__(self) -> str:
        return self.text
