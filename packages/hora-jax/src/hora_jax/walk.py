"""A traced function run again, with `View` values in place of planned weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

from hora_spec import HoraError
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.extend.core import Literal as Constant

from hora_jax.calls import CALLS
from hora_jax.dropout import Dropout
from hora_jax.follow import RULES
from hora_jax.products import multiply
from hora_jax.quantised import follow_codes
from hora_jax.routes import Way, varying
from hora_jax.views import View

Dense = Literal["allow", "error"]


def check_dense(dense: str) -> None:
    """Raise unless `dense` is one of ours."""
    if not isinstance(dense, str) or dense not in get_args(Dense):
        raise HoraError(f"dense must be one of {', '.join(get_args(Dense))}, got {dense!r} (spec D3)")


@dataclass(frozen=True)
class Use:
    """One place where a function consumes a planned weight.

    Attributes
    ----------
    path
        Of the weight.
    primitive
        What consumes it: ``dot_general``, another primitive of JAX, or ``output``.
    place
        File, line and function of the call.
    low_rank
        Whether the product is the base's plus a low-rank branch; else it is taken of ``W + delta``, whose gradient is
        as large as the weight.
    """

    path: str
    primitive: str
    place: str
    low_rank: bool


@dataclass
class Walk:
    """How planned weights are computed with, and what was found on the way."""

    route: Way
    dense: Dense
    dropout: Dropout | None = None
    uses: dict[tuple[Any, ...], Use] = field(default_factory=dict)
    places: dict[tuple[Any, ...], int] = field(default_factory=dict)
    within: tuple[int, ...] = ()
    place: str = ""

    def run(self, program: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
        """Results of a program; those that are planned weights are views."""
        return self._run(program.jaxpr, program.consts, args)

    def plain(self, value: Any, eqn: JaxprEqn | None) -> Any:
        """A value as an array: of a planned weight ``W + delta``, which is counted, or refused."""
        if not isinstance(value, View):
            return value
        use = self._note(value, eqn, low_rank=False)
        if value.codes or value.decoded or value.w.dtype.itemsize < 2:
            raise HoraError(
                "a quantised weight is followed from codes through one scale to products with floating activations, "
                f"got {use.path} in {use.primitive} at {use.place}: dequantise this weight before planning it (spec D3)"
            )
        if self.dropout is not None:
            raise HoraError(
                "dropout acts on the input of a product with a planned weight, got another use of "
                f"{use.path} in {use.primitive} at {use.place}: narrow the targets, or train without dropout"
            )
        if self.dense == "error":
            raise HoraError(
                f"a planned weight is multiplied with activations alone where dense='error', got {use.path} in "
                f"{use.primitive} at {use.place}: allow W + delta there, or narrow the targets (spec D3)"
            )
        return value.dense()

    def dropout_at(self, eqn: JaxprEqn) -> Dropout | None:
        """Dropout of one place in the program, however often it is traced."""
        if self.dropout is None:
            return None
        return self.dropout.at(self.places.setdefault((*self.within, id(eqn)), len(self.places)))

    def _note(self, view: View, eqn: JaxprEqn | None, *, low_rank: bool) -> Use:
        name, place = ("output", "") if eqn is None else (eqn.primitive.name, _place(eqn) or self.place)
        use = Use(view.path, name, place, low_rank)
        self.uses[(*self.within, id(eqn), view.path, low_rank)] = use
        return use

    def _run(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(var: Any) -> Any:
            return var.val if isinstance(var, Constant) else known[var]

        differing: dict[Any, frozenset[str]] = {}
        last = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.invars if not isinstance(var, Constant)}
        kept = {var for var in jaxpr.outvars if not isinstance(var, Constant)}
        for i, eqn in enumerate(jaxpr.eqns):
            ins = [read(var) for var in eqn.invars]
            over = [] if self.dropout is None else _differing(eqn, ins, differing)
            with eqn.ctx.manager:
                out = self._step(eqn, ins, over)
            known.update(zip(eqn.outvars, out, strict=True))
            for var in [*eqn.invars, *eqn.outvars]:
                if not isinstance(var, Constant) and var not in kept and last.get(var, i) == i:
                    known.pop(var, None)
        return [read(var) for var in jaxpr.outvars]

    def _step(self, eqn: JaxprEqn, ins: list[Any], over: list[frozenset[str]]) -> Sequence[Any]:
        if any(isinstance(v, View) for v in ins):
            name, out = eqn.primitive.name, None
            if name == "dot_general":
                out = self._dot(eqn, *ins, over=over)
            elif call := CALLS.get(name):
                inner = replace(self, within=(*self.within, id(eqn)), place=_place(eqn) or self.place)
                out = call(inner, eqn, ins)
            elif any(isinstance(v, View) and v.codes for v in ins):
                out = follow_codes(name, ins, partial(_bind, eqn), eqn.params)
            elif rule := RULES.get(name):
                out = rule(ins, partial(_bind, eqn), eqn.params)
            if out is not None:
                return out
            ins = [self.plain(v, eqn) for v in ins]
        return _bind(eqn, *ins)

    def _dot(self, eqn: JaxprEqn, lhs: Any, rhs: Any, *, over: list[frozenset[str]]) -> list[Any] | None:
        """A product with a planned weight; of two, the smaller is ``W + delta``."""
        if isinstance(lhs, View) and isinstance(rhs, View):
            if lhs.w.size <= rhs.w.size:
                lhs = self.plain(lhs, eqn)
            else:
                rhs = self.plain(rhs, eqn)
        dropout = self.dropout_at(eqn)
        drop = None if dropout is None else partial(dropout.drop, over=over[int(isinstance(lhs, View))])
        out = multiply(eqn, lhs, rhs, self.route, drop)
        if out is None:
            return None
        self._note(lhs if isinstance(lhs, View) else rhs, eqn, low_rank=True)
        return [out]


def _differing(eqn: JaxprEqn, ins: list[Any], before: dict[Any, frozenset[str]]) -> list[frozenset[str]]:
    """Mesh axes over which the operands' values differ; what a cast alone calls so is remembered as it was."""
    found = [
        frozenset() if isinstance(v, View) else varying(v) if isinstance(var, Constant) else before.get(var, varying(v))
        for var, v in zip(eqn.invars, ins, strict=True)
    ]
    if eqn.primitive.name in ("pvary", "pcast"):
        before |= dict(zip(eqn.outvars, found, strict=True))
    return found


def _bind(eqn: JaxprEqn, *ins: Any) -> list[Any]:
    out = eqn.primitive.bind(*ins, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _place(eqn: JaxprEqn) -> str:
    return source_info_util.summarize(eqn.source_info)
