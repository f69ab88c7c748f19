"""Whether the rows and heads of a plan are those that an attention uses."""

from collections.abc import Mapping
from dataclasses import dataclass

from hora_spec import Site
from torch import Tensor

from hora_torch.probing import Masks, Probe, Record, UntoldError, probes


@dataclass(frozen=True, slots=True)
class _Planned:
    """One projection of a plan: its role, the module that holds it, and where."""

    role: str
    module: str
    site: Site

    def by_head(self, masks: Masks) -> Tensor:
        """Its own of some marked rows, (heads, head_dim)."""
        shape, rows = self.site.projection, self.site.layout.rows(self.site.weight_shape)
        return masks[self.module][rows.index].reshape(shape.num_heads, shape.head_dim)


def rows_of_one_head(record: Record, sites: Mapping[str, Site], names: Mapping[str, str]) -> str:
    """What is wrong with the planned rows and heads of an attention; empty if nothing.

    Parameters
    ----------
    record
        Of a call of the attention.
    sites
        Projection to place.
    names
        Projection to the name of the child that holds it.

    Raises
    ------
    UntoldError
        If gradients do not show whose rows they are.
    """
    roles = {p: role for p in sites if (role := p.rpartition("_")[2]) in ("q", "k", "v")}
    plan = [_Planned(role, names[p], sites[p]) for p, role in roles.items()]
    q, v = (next((part for part in plan if part.role == role), None) for role in "qv")
    if q is None:
        raise UntoldError("any split of values alone looks right, and q is not adapted")
    if q.site.projection.num_heads == 1:
        raise UntoldError("one head looks like several that are joined")
    reasons: list[str] = []
    for probe in probes(record):
        try:
            return _fault(probe, plan, q, v)
        except UntoldError as reason:
            reasons.append(str(reason))
    raise UntoldError(reasons[0] if reasons else "nothing in it is seen to depend on all adapted projections")


def _fault(probe: Probe, plan: list[_Planned], q: _Planned, v: _Planned | None) -> str:
    """All that can be untold is asked first, so that a wrong plan is not what makes it so."""
    head = v.site.projection.head_dim if v else None
    boundary, width = (), probe.width
    if head is not None:  # the context may be beside something else
        boundary, width = (head - 1, head), min(width, head * q.site.projection.num_heads)
    columns = sorted({0, width - 1, *boundary} & set(range(probe.width)))
    found = {column: probe.column(column) for column in columns}
    local = {column: probe.local(column) for column in columns}
    if v and not all(any(rows.any() for rows in narrow.values()) for _, narrow in found.values()):
        raise UntoldError("no row acts on one column alone: values are normalised, or mixed with others")
    if bool(q.by_head(found[0][0]).all()):
        raise UntoldError("each row of q acts on every head: they are joined, by a norm or as heads that talk")
    heads: dict[int, int] = {}
    for column in columns:
        wide, narrow = found[column]
        for part in plan:
            if fault := _part_fault(part, wide, narrow, local[column]):
                return fault
        heads[column] = _head(q, wide)
        for part in plan:
            own = _head(part, narrow if part.role == "v" else wide)
            if own != heads[column] * part.site.projection.num_heads // q.site.projection.num_heads:
                return f"q and {part.role} of one head are planned as different heads"
    if head is not None and (heads.get(head - 1) != heads[0] or heads.get(head) == heads[0]):
        return f"the heads of the attention have another width than a planned head of v, {head}"
    return ""


def _part_fault(part: _Planned, wide: Masks, narrow: Masks, local: Masks) -> str:
    shape, alone = part.site.projection, part.role == "v"
    right, other = (part.by_head(masks) for masks in ((narrow, wide) if alone else (wide, narrow)))
    expected, count = 1 if alone else shape.head_dim, int(right.sum())
    touched = int((right | other).any(1).sum())
    if count != expected or touched != 1 or bool(other.any()):
        found = count + int(other.sum())
        return f"a head depends on {expected} rows of {part.role} in one planned head, got {found} in {touched}"
    own = part.by_head(local)
    if part.role == "q" and bool((right & ~own).any()):
        return "the planned rows of q act on other positions than their own, as those of a planned head of k do"
    return ""


def _head(part: _Planned, masks: Masks) -> int:
    return int(part.by_head(masks).any(1).nonzero()[0])
