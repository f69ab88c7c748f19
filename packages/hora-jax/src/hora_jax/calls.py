"""Primitives that run other programs: each is called again around the program walked with views inside.

What a loop or a choice hands on unchanged JAX has taken out of it before a program gets here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from hora_spec import HoraError
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jax.sharding import PartitionSpec
from jaxtyping import Array

from hora_jax.dropout import Dropout
from hora_jax.views import View

if TYPE_CHECKING:
    from hora_jax.walk import Walk

Call = Callable[["Walk", JaxprEqn, Sequence[Any]], Sequence[Any]]


def _inline(walk: "Walk", eqn: JaxprEqn, ins: Sequence[Any]) -> Sequence[Any]:
    """`jax.jit` and its like: under the caller's own compilation they are one program anyhow."""
    program = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
    out = walk.run(_closed(program), ins)
    wanted = eqn.params.get("out_shardings", (None,) * len(out))
    return [
        jax.lax.with_sharding_constraint(v, where)
        if isinstance(where, jax.sharding.Sharding) and not isinstance(v, View)
        else v
        for v, where in zip(out, wanted, strict=True)
    ]


def _remat(walk: "Walk", eqn: JaxprEqn, ins: Sequence[Any]) -> Sequence[Any]:
    program = _closed(eqn.params["jaxpr"])
    again = jax.checkpoint(
        lambda *ins: walk.run(program, ins), prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
    )
    return again(*ins)


def _scan(walk: "Walk", eqn: JaxprEqn, ins: Sequence[Any]) -> Sequence[Any]:
    """A weight that is scanned over is sliced with those of its factors that have the axis."""
    program, (consts, carries) = eqn.params["jaxpr"], _counts(eqn.params)
    before, init, xs = ins[:consts], ins[consts : consts + carries], ins[consts + carries :]
    dropout = walk.dropout_at(eqn)

    def body(carry: list[Any], step: tuple[list[Any], Array | None]) -> tuple[list[Any], list[Any]]:
        slices, number = step
        rows = [_row(whole, part) for whole, part in zip(xs, slices, strict=True)]
        out = [walk.plain(v, eqn) for v in _step(walk, dropout, number).run(program, [*before, *carry, *rows])]
        return out[:carries], out[carries:]

    options = {
        name: eqn.params[name] for name in ("length", "reverse", "unroll", "_split_transpose") if name in eqn.params
    }
    numbers = None if dropout is None else jnp.arange(eqn.params["length"])
    start = [walk.plain(v, eqn) for v in init]
    carry, ys = jax.lax.scan(body, start, ([_sliced(v) for v in xs], numbers), **options)
    return [*carry, *ys]


def _step(walk: "Walk", dropout: Dropout | None, number: Array | None) -> "Walk":
    """The walk of one step of a loop, which drops inputs of its own."""
    return walk if dropout is None else replace(walk, dropout=dropout.at(number))


def _counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried; since JAX 0.12 they are trees."""
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def _sliced(value: Any) -> Any:
    """What a scan slices: of a view, w and the factors that have its leading axis."""
    if not isinstance(value, View):
        return value
    return value.w, *(f if f.shape[0] == value.w.shape[0] else None for f in (value.a, value.b))


def _row(whole: Any, part: Any) -> Any:
    if not isinstance(whole, View):
        return part
    w, *own = part
    a, b = (f.squeeze(0) if row is None else row for f, row in zip((whole.a, whole.b), own, strict=True))
    return whole.moved(w, a, b)


def _while(walk: "Walk", eqn: JaxprEqn, ins: Sequence[Any]) -> Sequence[Any]:
    test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    tests, bodies = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_test, of_body, init = ins[:tests], ins[tests : tests + bodies], ins[tests + bodies :]
    dropout = walk.dropout_at(eqn)

    def step(state: tuple[Any, Sequence[Any]]) -> tuple[Any, list[Any]]:
        number, carry = state
        out = _step(walk, dropout, number).run(body, [*of_body, *carry])
        return None if dropout is None else number + 1, [walk.plain(v, eqn) for v in out]

    def goes_on(state: tuple[Any, Sequence[Any]]) -> Array:
        return _step(walk, dropout, state[0]).run(test, [*of_test, *state[1]])[0]

    start = [walk.plain(v, eqn) for v in init]
    return jax.lax.while_loop(goes_on, step, (None if dropout is None else 0, start))[1]


def _cond(walk: "Walk", eqn: JaxprEqn, ins: Sequence[Any]) -> Sequence[Any]:
    index, *operands = ins

    def branch(program: ClosedJaxpr) -> Callable[[], list[Any]]:
        return lambda: [walk.plain(v, eqn) for v in walk.run(program, operands)]

    return jax.lax.switch(jnp.asarray(index, jnp.int32), [branch(program) for program in eqn.params["branches"]])


def _shard_map(walk: "Walk", eqn: JaxprEqn, ins: Sequence[Any]) -> Sequence[Any]:
    """Factors are sharded as the weight is, along the axes they have."""
    program, params = _closed(eqn.params["jaxpr"]), eqn.params
    if walk.dropout is not None and not params["check_vma"]:
        raise HoraError(
            "shards that hold different inputs drop entries of their own, got dropout with a jax.shard_map that does "
            "not know which do: leave its check_vma at True"
        )
    flat, tree = jax.tree.flatten(list(ins))
    specs = [spec for v, spec in zip(ins, params["in_specs"], strict=True) for spec in _specs(v, spec)]

    def body(*flat: Array) -> list[Any]:
        return [walk.plain(v, eqn) for v in walk.run(program, tree.unflatten(flat))]

    mapped = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=list(params["out_specs"]),
        axis_names=params["manual_axes"] if "manual_axes" in params else params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )
    return mapped(*flat)


def _specs(value: Any, spec: PartitionSpec) -> list[PartitionSpec]:
    if not isinstance(value, View):
        return [spec]
    axes = [*spec, *(None,) * (value.w.ndim - len(spec))]
    owned = (value.owned(factor) for factor in (value.a, value.b))
    return [spec, *(PartitionSpec(*(axis if i in has else None for i, axis in enumerate(axes)), None) for has in owned)]


def _closed(program: Any) -> ClosedJaxpr:
    return program if isinstance(program, ClosedJaxpr) else ClosedJaxpr(program, ())


CALLS: dict[str, Call] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "core_closed_call"), _inline),
    **dict.fromkeys(("remat", "remat2", "checkpoint"), _remat),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
